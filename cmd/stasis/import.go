package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/layer"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// Bounds on what is accepted from an archive.
const (
	maxMembers   = 1 << 17
	maxJSON      = 16 << 20
	maxLayerEnts = 1 << 20
	// importReserve must remain free in the store.
	importReserve = 64 << 20
)

// importOptions are what the operator says about an archive.
type importOptions struct {
	identity    checkpoint.Identity
	imageDigest string
	assumeHost  bool
	maxBytes    int64
}

func (c *cli) importCommand() *cobra.Command {
	var o importOptions
	cmd := &cobra.Command{
		Use:   "import ARCHIVE --namespace NAMESPACE --key KEY --container NAME",
		Short: "Put a checkpoint archive into the store",
		Long: `import reads an archive, of stasis export or of the CRI checkpoint call, and
commits it under the identity that you give: the next container of that
namespace, key (annotation ` + checkpoint.AnnotationKey + `) and name goes on from it, if its
image, its spec and the node fit.

WARNING: whoever made the archive decides what runs in that container, with the
rights of the container. Import only what you trust. The archive is read as
hostile nevertheless: only known names, only regular files, bounded sizes; the
processes must parse and must not exceed the rights in the archive's own spec,
and at the restore those of the container.

The image's digest comes from the archive if stasis made it, else from
--image-digest: the digest of the manifest or index that the container's image
resolves to on this node. An archive that stasis did not make does not say on
which CPU it was dumped; --assume-this-host takes it for this one.`,
		Example: `  stasis import /root/db-0.tar --namespace default --key db-0 --container postgres
  stasis import /var/lib/kubelet/checkpoints/checkpoint-x.tar --namespace default --key web \
      --container web --image-digest sha256:… --assume-this-host`,
		Args: usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.identity.Validate(); err != nil {
				return usageError{fmt.Errorf("--namespace, --key and --container are needed: %w", err)}
			}
			if err := checkpoint.ValidateKey(o.identity.Key); err != nil {
				return usageError{fmt.Errorf("--key: %w", err)}
			}
			st, err := c.open()
			if err != nil {
				return err
			}
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			m, err := importArchive(cmd.Context(), st, f, o)
			if err != nil {
				return fmt.Errorf("import %s: %w", args[0], err)
			}
			if c.output == "json" {
				return c.printJSON(m)
			}
			_, err = fmt.Fprintf(c.out, "%s of %s, %s\n", m.ID, m.Identity, size(m.Sizes.TotalBytes))
			return err
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.identity.Namespace, "namespace", "n", "", "namespace of the pod that may begin from it")
	f.StringVar(&o.identity.Key, "key", "", "key of that pod")
	f.StringVar(&o.identity.Container, "container", "", "name of the container in that pod")
	f.StringVar(&o.imageDigest, "image-digest", "", "digest of the container's image, sha256:...")
	f.BoolVar(&o.assumeHost, "assume-this-host", false, "take the archive for one dumped on a node like this one")
	f.Int64Var(&o.maxBytes, "max-bytes", 64<<30, "refuse an archive whose files are larger in sum")
	return cmd
}

// importArchive stages an archive's files, checks them and commits them.
func importArchive(ctx context.Context, st *store.Store, r io.Reader, o importOptions) (_ *checkpoint.Manifest, err error) {
	now := time.Now()
	m := &checkpoint.Manifest{
		FormatVersion: checkpoint.FormatVersion, ID: checkpoint.NewID(o.identity, now), Identity: o.identity, CreatedAt: now.UTC(), Generation: 1,
		Settings: checkpoint.Settings{Policy: checkpoint.PolicyResume, Key: o.identity.Key, OnFailure: checkpoint.OnFailureColdStart, TCP: checkpoint.TCPClose},
	}
	stage, err := st.Stage(ctx, m.ID)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stage.Abort())
		}
	}()
	free, err := st.FreeBytes()
	if err != nil {
		return nil, err
	}
	u := &unpacker{ctx: ctx, dir: stage.Dir(), left: min(o.maxBytes, free-importReserve), seen: map[string]bool{}}
	if err := u.unpack(r); err != nil {
		return nil, err
	}
	if err := u.describe(m, o); err != nil {
		return nil, err
	}
	if m.Host.Arch == "" {
		if m.Host, err = criu.HostFacts(ctx); err != nil {
			return nil, err
		}
	}
	images := filepath.Join(stage.Dir(), checkpoint.ImageDir)
	report, err := criu.Inspect(images)
	if err != nil {
		return nil, err
	}
	if err := criu.CheckAgainstSpec(images, u.spec); err != nil {
		return nil, err
	}
	m.Hostname, m.Sizes.MemoryBytes = report.Hostname, u.imageBytes
	if u.diff != "" {
		if m.Sizes.LayerBytes, err = u.convertDiff(); err != nil {
			return nil, fmt.Errorf("%s: %w", metadata.RootFsDiffTar, err)
		}
	}
	if err := stage.Commit(ctx, m); err != nil {
		return nil, err
	}
	return m, nil
}

// unpacker puts the members of a hostile archive into a stage.
type unpacker struct {
	ctx     context.Context
	dir     string
	left    int64 // bytes that may still be written
	members int
	seen    map[string]bool

	imageBytes int64
	diff       string // the OCI layer, outside of what is committed until converted
	manifest   *checkpoint.Manifest
	config     metadata.ContainerConfig
	spec       *specs.Spec
}

// diffTemp is where rootfs-diff.tar lies until it is converted.
const diffTemp = ".rootfs-diff.tar"

// imageName is the form of the names that CRIU and runc give their files.
var imageName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$`)

var volumeName = regexp.MustCompile(`^[0-9]{1,4}\.layer$`)

// notNeeded are members of other engines' archives without which a restore
// works here.
var notNeeded = map[string]bool{
	metadata.StatusDumpFile: true, metadata.StatusFile: true, metadata.NetworkStatusFile: true, metadata.DeletedFilesFile: true,
	"container.log": true, metadata.RestoreLogFile: true, "bind.mounts": true,
}

func refuse(name, format string, a ...any) error {
	return fmt.Errorf("member %.200q: "+format+": %w", append(append([]any{name}, a...), checkpoint.ErrInvalid)...)
}

// gunzip decompresses what is compressed; the kubelet's rootfs-diff.tar is.
func gunzip(r io.Reader) (io.Reader, error) {
	br := bufio.NewReaderSize(r, 1<<20)
	if magic, err := br.Peek(2); err == nil && bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return gzip.NewReader(br)
	}
	return br, nil
}

func (u *unpacker) unpack(r io.Reader) error {
	plain, err := gunzip(r)
	if err != nil {
		return err
	}
	// What is skipped counts as well: a compressed archive may grow without end.
	limited := &io.LimitedReader{R: plain, N: u.left + maxMembers*1024}
	tr := tar.NewReader(limited)
	for {
		if err := u.ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) && limited.N > 0 {
			break
		}
		if err != nil {
			if limited.N <= 0 {
				err = errors.New("larger than --max-bytes, or than the room in the store, allows")
			}
			return fmt.Errorf("archive: %w: %w", err, checkpoint.ErrInvalid)
		}
		if u.members++; u.members > maxMembers {
			return fmt.Errorf("archive: more than %d members: %w", maxMembers, checkpoint.ErrInvalid)
		}
		if err := u.member(h, tr); err != nil {
			return err
		}
	}
	for _, name := range []string{metadata.ConfigDumpFile, metadata.SpecDumpFile, metadata.CheckpointDirectory + "/inventory.img"} {
		if !u.seen[name] {
			return fmt.Errorf("archive: no %s, so this is no checkpoint of a container: %w", name, checkpoint.ErrInvalid)
		}
	}
	return nil
}

func (u *unpacker) member(h *tar.Header, r io.Reader) error {
	name := strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/")
	if name == "" || name == "." {
		return nil
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") { // archive/tar expands it out of all proportion
			return refuse(h.Name, "sparse")
		}
	}
	dir, base := path.Split(name)
	switch {
	case h.Typeflag == tar.TypeDir:
		if name != metadata.CheckpointDirectory && name != metadata.CheckpointVolumesDirectory {
			return refuse(h.Name, "unknown directory")
		}
		return nil
	case h.Typeflag != tar.TypeReg:
		return refuse(h.Name, "type %q, want a regular file", h.Typeflag)
	case u.seen[name]:
		return refuse(h.Name, "twice")
	case notNeeded[name]:
		return nil
	}
	u.seen[name] = true
	into := func(v any) error {
		b, err := readBounded(r, maxJSON)
		if err != nil {
			return refuse(h.Name, "%v", err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			return refuse(h.Name, "%v", err)
		}
		if name == metadata.SpecDumpFile {
			return u.write(checkpoint.SpecFile, int64(len(b)), bytes.NewReader(b))
		}
		return nil
	}
	switch {
	case name == metadata.ConfigDumpFile:
		return into(&u.config)
	case name == metadata.SpecDumpFile:
		return into(&u.spec)
	case name == checkpoint.ManifestFile:
		m, err := checkpoint.ReadManifest(r)
		if err != nil {
			return refuse(h.Name, "%v", err)
		}
		u.manifest = m
		return nil
	case name == metadata.RootFsDiffTar:
		u.diff = diffTemp
		return u.write(diffTemp, h.Size, r)
	case name == metadata.DumpLogFile:
		return u.write(checkpoint.DumpLogFile, h.Size, r)
	case name == statsFile:
		return u.write(statsFile, h.Size, r)
	case dir == checkpoint.ImageDir+"/" && imageName.MatchString(base):
		u.imageBytes += h.Size
		return u.write(name, h.Size, r)
	case dir == checkpoint.VolumeDir+"/" && volumeName.MatchString(base):
		if err := os.Mkdir(filepath.Join(u.dir, checkpoint.VolumeDir), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return u.write(name, h.Size, r)
	case name == metadata.DevShmCheckpointTar:
		return refuse(h.Name, "Podman's form of /dev/shm cannot be imported; checkpoint a container with an empty one")
	}
	return refuse(h.Name, "unknown")
}

func readBounded(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	return b, err
}

// write makes one file of the stage. The name is one of ours by now.
func (u *unpacker) write(name string, size int64, r io.Reader) error {
	if u.left -= size; u.left < 0 {
		return fmt.Errorf("archive: %w: larger than --max-bytes, or than the room in the store, allows", checkpoint.ErrNoSpace)
	}
	f, err := os.OpenFile(filepath.Join(u.dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if n, err := io.Copy(f, contextReader{u.ctx, r}); err != nil || n != size {
		return fmt.Errorf("member %q: %d of %d bytes: %w", name, n, size, errors.Join(err, checkpoint.ErrInvalid))
	}
	return f.Close()
}

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(b)
}

// describe fills the manifest from what the archive and the operator say.
func (u *unpacker) describe(m *checkpoint.Manifest, o importOptions) error {
	if u.spec == nil || u.spec.Process == nil {
		return fmt.Errorf("%s: no process in it: %w", metadata.SpecDumpFile, checkpoint.ErrInvalid)
	}
	m.ContainerID, m.ImageName = short(u.config.ID), short(u.config.RootfsImageName)
	m.PodName = short(u.spec.Annotations[checkpoint.CRISandboxName])
	m.Fingerprint = checkpoint.ComputeFingerprint(u.spec)
	m.ImageDigest = o.imageDigest
	m.Lost = []string{"imported: what the archive of container " + m.ContainerID + " did not hold"}
	if old := u.manifest; old != nil {
		m.Host, m.Volumes, m.Lost, m.UptimeMillis = old.Host, old.Volumes, old.Lost, old.UptimeMillis
		m.Settings.TCP = old.Settings.TCP
		if m.ImageDigest == "" {
			m.ImageDigest = old.ImageDigest
		}
		for _, v := range old.Volumes {
			if !u.seen[v.File] {
				return fmt.Errorf("archive: no %s, the content of %s: %w", v.File, v.Destination, checkpoint.ErrInvalid)
			}
		}
	} else if u.seenVolume() {
		return fmt.Errorf("archive: volumes without %s, which says what they are: %w", checkpoint.ManifestFile, checkpoint.ErrInvalid)
	} else if !o.assumeHost {
		return fmt.Errorf("the archive does not say on which CPU it was dumped; --assume-this-host takes it for one like this node's: %w", checkpoint.ErrInvalid)
	}
	if m.ImageDigest == "" {
		return fmt.Errorf("the archive does not say of which image its container was; give --image-digest: %w", checkpoint.ErrInvalid)
	}
	for _, v := range m.Volumes {
		st, err := os.Stat(filepath.Join(u.dir, v.File))
		if err != nil {
			return err
		}
		m.Sizes.VolumeBytes += st.Size()
	}
	return nil
}

func (u *unpacker) seenVolume() bool {
	for name := range u.seen {
		if strings.HasPrefix(name, checkpoint.VolumeDir+"/") {
			return true
		}
	}
	return false
}

func short(s string) string {
	s = clean(s)
	return s[:min(len(s), 253)]
}

// convertDiff makes the writable layer from an OCI layer: it is rewritten as
// a layer's stream, applied to a directory, which checks it as any untrusted
// layer is checked, and captured from there. It returns the layer's size.
func (u *unpacker) convertDiff() (int64, error) {
	src, err := os.Open(filepath.Join(u.dir, diffTemp))
	if err != nil {
		return 0, err
	}
	defer src.Close()
	tree := filepath.Join(u.dir, ".rootfs-diff")
	if err := os.Mkdir(tree, 0o700); err != nil {
		return 0, err
	}
	opaque, err := opaqueDirs(u.ctx, src, u.left)
	if err != nil {
		return 0, err
	}
	pr, pw := io.Pipe()
	go func() { // ends with the pipe
		pw.CloseWithError(writeLayer(u.ctx, pw, src, opaque, u.left))
	}()
	_, err = layer.Apply(u.ctx, pr, tree, layer.Options{MaxBytes: u.left, MaxEntries: maxLayerEnts})
	pr.CloseWithError(errors.New("no longer read")) // ends the goroutine
	if err != nil {
		return 0, err
	}
	dst, err := os.OpenFile(filepath.Join(u.dir, checkpoint.RootfsDiffFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer dst.Close()
	if _, err := layer.Capture(u.ctx, dst, tree); err != nil {
		return 0, err
	}
	n, err := dst.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	return n, errors.Join(dst.Close(), os.RemoveAll(tree), os.Remove(filepath.Join(u.dir, diffTemp)))
}

// eachDiff reads the entries of an OCI layer from its beginning.
func eachDiff(ctx context.Context, f io.ReadSeeker, limit int64, fn func(h *tar.Header, r io.Reader) error) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	plain, err := gunzip(f)
	if err != nil {
		return err
	}
	limited := &io.LimitedReader{R: plain, N: limit + maxLayerEnts*2048}
	tr := tar.NewReader(limited)
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) && limited.N > 0 {
			return nil
		}
		if err == nil && n >= maxLayerEnts {
			err = fmt.Errorf("more than %d entries", maxLayerEnts)
		}
		if err != nil {
			return fmt.Errorf("%w: %w", err, checkpoint.ErrInvalid)
		}
		if err := fn(h, tr); err != nil {
			return err
		}
	}
}

func diffName(h *tar.Header) string { return path.Clean(strings.TrimPrefix(h.Name, "/")) }

// opaqueDirs finds the directories that hide all that is below them in the
// image; a layer says so with the directory itself.
func opaqueDirs(ctx context.Context, f io.ReadSeeker, limit int64) (map[string]bool, error) {
	dirs := map[string]bool{}
	return dirs, eachDiff(ctx, f, limit, func(h *tar.Header, _ io.Reader) error {
		if dir, base := path.Split(diffName(h)); base == opaqueName {
			dirs[path.Clean(dir)] = true
		}
		return nil
	})
}

// writeLayer rewrites an OCI layer in the format of package layer.
func writeLayer(ctx context.Context, w io.Writer, f io.ReadSeeker, opaque map[string]bool, limit int64) error {
	tw := tar.NewWriter(w)
	global := func(key, value string) error {
		return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{key: value}, Format: tar.FormatPAX})
	}
	if err := global("STASIS.layer", "1"); err != nil {
		return err
	}
	entries, haveRoot := 0, false
	put := func(h *tar.Header) error {
		entries++
		h.Format = tar.FormatPAX
		return tw.WriteHeader(h)
	}
	// The root of the tree comes first; where the diff has none, the image's
	// stays, and that is 0755 in every image's root.
	root := func() error {
		haveRoot = true
		return put(&tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755, ModTime: time.Unix(0, 0)})
	}
	made := map[string]bool{".": true}
	err := eachDiff(ctx, f, limit, func(h *tar.Header, r io.Reader) error {
		name := diffName(h)
		out := &tar.Header{Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode & 0o7777,
			Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor, PAXRecords: map[string]string{}}
		if !haveRoot && name != "." {
			if err := root(); err != nil {
				return err
			}
		}
		parent, base := path.Split(name)
		if parent = path.Clean(parent); !made[parent] {
			return refuse(h.Name, "directory %q is not in the layer, so its owner and mode are not known", parent)
		}
		hidden, whiteout := strings.CutPrefix(base, whiteoutPrefix)
		switch {
		case base == opaqueName:
			return nil
		case whiteout:
			out = &tar.Header{Typeflag: tar.TypeChar, Name: path.Join(parent, hidden), Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime}
			return put(out)
		case h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0:
			return refuse(h.Name, "device 0:0, which is a whiteout to the overlay but not in an OCI layer")
		case h.Typeflag == tar.TypeDir:
			if made[name] && name != "." || name == "." && haveRoot {
				return refuse(h.Name, "twice")
			}
			made[name] = true
			out.Name += "/"
			if name == "." {
				haveRoot = true
			}
			if opaque[name] {
				out.PAXRecords["SCHILY.xattr.trusted.overlay.opaque"] = "y"
			}
		case h.Typeflag == tar.TypeLink:
			out.Linkname, out.Size = path.Clean(strings.TrimPrefix(h.Linkname, "/")), 0
		}
		for k, v := range h.PAXRecords {
			x, ok := strings.CutPrefix(k, "SCHILY.xattr.")
			switch {
			case strings.HasPrefix(k, "GNU.sparse."):
				return refuse(h.Name, "sparse")
			case ok && strings.HasPrefix(x, "trusted."):
				return refuse(h.Name, "attribute %.100q", x)
			case ok && x != "security.selinux": // the runtime labels files itself
				out.PAXRecords[k] = v
			}
		}
		if err := put(out); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeReg {
			_, err := io.Copy(tw, contextReader{ctx, r})
			return err
		}
		return nil
	})
	if err != nil {
		return err
	}
	if !haveRoot {
		if err := root(); err != nil {
			return err
		}
	}
	if err := global("STASIS.end", strconv.Itoa(entries)); err != nil {
		return err
	}
	return tw.Close()
}
