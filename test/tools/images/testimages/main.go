// Command testimages makes the images that the tests run in their pods, out of the files of a Debian
// root file system, and pushes them to a registry. The same files give the same images, bit by bit.
//
//	testimages build --rootfs DIR --bin DIR --java DIR --tomcat DIR --layout DIR
//	testimages push --layout DIR --registry HOST:PORT
package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// refName is the annotation that gives an image of a layout its name.
const refName = "org.opencontainers.image.ref.name"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testimages:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("testimages", flag.ContinueOnError)
	rootfs := flags.String("rootfs", "", "root file system to take files from")
	bin := flags.String("bin", "", "directory of the pause and nonewprivs programs")
	java := flags.String("java", "", "directory of a Java runtime, with the service in classes")
	tomcat := flags.String("tomcat", "", "directory of what Tomcat's image holds besides a small system")
	dir := flags.String("layout", "", "directory of the OCI layout")
	registry := flags.String("registry", "", "registry to push to")
	if len(args) == 0 {
		return errors.New("usage: testimages build|push FLAGS")
	}
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	switch args[0] {
	case "build":
		return build(&builder{rootfs: *rootfs, bin: *bin, java: *java, tomcat: *tomcat}, *dir)
	case "push":
		return push(*dir, *registry)
	}
	return fmt.Errorf("unknown command %q", args[0])
}

func build(b *builder, dir string) error {
	specs := b.specs()
	if b.err != nil {
		return b.err
	}
	out, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	layers := map[*tree]v1.Layer{}
	for _, s := range specs {
		img, err := s.build(layers)
		if err != nil {
			return fmt.Errorf("building %s: %w", s.names[0], err)
		}
		for _, n := range s.names {
			if err := out.AppendImage(img, layout.WithAnnotations(map[string]string{refName: n})); err != nil {
				return fmt.Errorf("writing %s: %w", n, err)
			}
		}
	}
	return nil
}

func push(dir, registry string) error {
	// The registry may have been started a moment ago.
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		conn, err := net.Dial("tcp", registry)
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waiting for the registry: %w", err)
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range manifest.Manifests {
		ref, err := name.ParseReference(registry+"/"+d.Annotations[refName], name.Insecure)
		if err != nil {
			return err
		}
		img, err := index.Image(d.Digest)
		if err != nil {
			return err
		}
		if err := remote.Write(ref, img); err != nil {
			return fmt.Errorf("pushing %s: %w", ref, err)
		}
	}
	return nil
}
