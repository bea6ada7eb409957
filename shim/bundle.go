package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/containerd/api/types"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

const (
	specFile       = "config.json"
	criuConfigFile = "criu.conf"
)

// readAnnotations reads only the annotations of a bundle's spec: all that a
// container which did not opt in is asked for.
func readAnnotations(bundle string) (map[string]string, error) {
	data, err := os.ReadFile(filepath.Join(bundle, specFile))
	if err != nil {
		return nil, err
	}
	var s struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("parse %s: %w", specFile, err)
	}
	return s.Annotations, nil
}

func readSpec(bundle string) (*specs.Spec, error) {
	data, err := os.ReadFile(filepath.Join(bundle, specFile))
	if err != nil {
		return nil, err
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("parse %s: %w", specFile, err)
	}
	return &s, nil
}

// setCRIUConfig makes runc use the bundle's own CRIU configuration file, or
// removes the annotation when path is empty. Everything else in the spec is
// kept as it is, known to us or not.
func setCRIUConfig(bundle, path string) error {
	name := filepath.Join(bundle, specFile)
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(data, &doc); err != nil {
		return fmt.Errorf("parse %s: %w", specFile, err)
	}
	annotations := map[string]string{}
	if raw, ok := doc["annotations"]; ok {
		if err := json.Unmarshal(raw, &annotations); err != nil {
			return fmt.Errorf("parse annotations of %s: %w", specFile, err)
		}
	}
	if path == "" {
		delete(annotations, checkpoint.CRIUConfigAnnotation)
	} else {
		annotations[checkpoint.CRIUConfigAnnotation] = path
	}
	if doc["annotations"], err = json.Marshal(annotations); err != nil {
		return err
	}
	if data, err = json.Marshal(doc); err != nil {
		return err
	}
	// The bundle lies on tmpfs and dies with the container: no durability needed.
	return os.WriteFile(name, data, 0o600)
}

// identityOf takes the identity from what CRI wrote and the daemon resolved.
func identityOf(annotations map[string]string) (checkpoint.Identity, error) {
	i := checkpoint.Identity{
		Namespace: annotations[checkpoint.CRISandboxNamespace],
		Key:       annotations[checkpoint.InternalKey],
		Container: annotations[checkpoint.CRIContainerName],
	}
	return i, i.Validate()
}

// settingsOf reads the daemon's annotations; unknown values are errors, for
// the daemon never writes them.
func settingsOf(annotations map[string]string) (checkpoint.Settings, error) {
	return checkpoint.ParseSettings(map[string]string{
		checkpoint.AnnotationPolicy:       annotations[checkpoint.InternalPolicy],
		checkpoint.AnnotationKey:          annotations[checkpoint.InternalKey],
		checkpoint.AnnotationOnFailure:    annotations[checkpoint.InternalOnFailure],
		checkpoint.AnnotationTCP:          annotations[checkpoint.InternalTCP],
		checkpoint.AnnotationTemplate:     annotations[checkpoint.InternalTemplate],
		checkpoint.AnnotationMemory:       annotations[checkpoint.InternalMemory],
		checkpoint.AnnotationAfterRestore: annotations[checkpoint.InternalAfterRestore],
		checkpoint.AnnotationMerge:        annotations[checkpoint.InternalMerge],
	}, "")
}

var errNoUpperDir = fmt.Errorf("the root file system is not an overlay with a writable layer (use the overlayfs snapshotter): %w", checkpoint.ErrUnsupported)

// overlayDirs finds the writable layer and the work directory in the rootfs
// mounts of a create request.
func overlayDirs(mounts []*types.Mount) (upper, work string, err error) {
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		return "", "", errNoUpperDir
	}
	for _, o := range mounts[0].Options {
		if v, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = v
		}
		if v, ok := strings.CutPrefix(o, "workdir="); ok {
			work = v
		}
	}
	if !filepath.IsAbs(upper) || !filepath.IsAbs(work) {
		return "", "", errNoUpperDir
	}
	return upper, work, nil
}

// volume is a memory-backed mount of a container whose content is part of its state.
type volume struct {
	destination string
	source      string // on the host
}

// memoryVolumes lists the writable bind mounts whose source is the root of a
// tmpfs of its own: the pod's /dev/shm and emptyDirs of medium Memory. A
// directory inside a larger tmpfs is the host's, not the pod's.
func memoryVolumes(s *specs.Spec) ([]volume, error) {
	var vs []volume
	for _, m := range s.Mounts {
		if m.Type != "bind" && m.Type != "" || !filepath.IsAbs(m.Source) || readOnly(m.Options) {
			continue
		}
		own, err := isTmpfsRoot(m.Source)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("volume %s: %w", m.Destination, err)
		}
		if own && !hostTmpfs[filepath.Clean(m.Source)] {
			vs = append(vs, volume{destination: filepath.Clean(m.Destination), source: m.Source})
		}
	}
	return vs, nil
}

// hostTmpfs are the node's own; a pod that mounts one shares it with the host.
var hostTmpfs = map[string]bool{"/run": true, "/dev/shm": true, "/tmp": true, "/dev": true, "/run/lock": true, "/run/shm": true}

// readOnly tells whether mount options say so. Secrets and other projected
// volumes are such mounts; what they hold must not get into a checkpoint.
func readOnly(options []string) bool {
	return slices.Contains(options, "ro") || slices.Contains(options, "rro") // rro: recursively
}

func isTmpfsRoot(path string) (bool, error) {
	var st, parent unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false, nil
	}
	if err := unix.Lstat(filepath.Dir(filepath.Clean(path)), &parent); err != nil {
		return false, &os.PathError{Op: "lstat", Path: filepath.Dir(path), Err: err}
	}
	if st.Dev == parent.Dev {
		return false, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return false, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return fs.Type == unix.TMPFS_MAGIC, nil
}

// hostnameOf returns the host name that a container with this spec sees.
func hostnameOf(s *specs.Spec) (string, error) {
	if s.Linux != nil {
		for _, ns := range s.Linux.Namespaces {
			if ns.Type == specs.UTSNamespace && ns.Path != "" {
				return hostnameIn(ns.Path)
			}
		}
	}
	return s.Hostname, nil
}

// hostnameIn asks in the UTS namespace itself, on a thread that comes back from
// it. The thread must not end: it may have started a runc, which the kernel then
// kills (go-runc asks for that by Pdeathsig).
func hostnameIn(path string) (string, error) {
	type answer struct {
		name string
		err  error
	}
	ch := make(chan answer, 1)
	go func() {
		runtime.LockOSThread()
		name, back, err := hostnameThere(path)
		if back {
			runtime.UnlockOSThread()
		} // else the thread is of no more use, and ends with this function
		ch <- answer{name, err}
	}()
	a := <-ch
	return a.name, a.err
}

// hostnameThere runs on a locked thread, and reports whether that is in its own
// namespace afterwards.
func hostnameThere(path string) (name string, back bool, err error) {
	own, err := os.Open("/proc/thread-self/ns/uts")
	if err != nil {
		return "", true, err
	}
	defer own.Close()
	f, err := os.Open(path)
	if err != nil {
		return "", true, err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWUTS); err != nil {
		return "", true, fmt.Errorf("enter uts namespace %s: %w", path, err)
	}
	var u unix.Utsname
	err = unix.Uname(&u)
	if berr := unix.Setns(int(own.Fd()), unix.CLONE_NEWUTS); berr != nil {
		return "", false, fmt.Errorf("leave uts namespace %s: %w", path, berr)
	}
	if err != nil {
		return "", true, fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Nodename[:]), true, nil
}
