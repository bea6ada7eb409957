package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/process"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/runc"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// NewManager makes a manager of shims clean up after a shim that died in the
// middle of a dump or a restore: containerd then calls the shim's binary to
// remove what is left of each of its containers.
func NewManager(inner shim.Shim) shim.Shim { return manager{inner} }

type manager struct{ shim.Shim }

// Stop removes the container. Its processes may be frozen, and a runc and a CRIU
// may be at work that outlived the shim: at its end CRIU freezes again what it
// found frozen, and on cgroup v1 a frozen process does not even die. So these
// two end first, then the processes.
//
// A runc that restores dies with its shim, and leaves what it removes itself
// otherwise: a mount of the root file system in its directory, through which
// `runc delete` would remove every file, and the cgroup, of which it knows only
// when the restore is done.
func (m manager) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	dir, err := bundleOf(id)
	if err == nil {
		err = errors.Join(release(id), detach(dir))
	}
	if err != nil {
		log.G(ctx).WithField("container_id", id).WithError(err).Warn("release container of a dead shim")
	}
	status, err := m.Shim.Stop(ctx, id)
	if err := errors.Join(removeCgroup(ctx, id), unmountYards(ctx, dir), unmountTmpfs(dir)); err != nil {
		log.G(ctx).WithField("container_id", id).WithError(err).Warn("remove cgroup of a dead shim's container")
	}
	return status, err
}

// unmountYards unmounts what a CRIU that was killed in a restore has mounted of
// cgroup version 1 in its work directory (criu/cgroup.c, prepare_cgroup), so that
// containerd can remove that.
func unmountYards(ctx context.Context, bundle string) error {
	work, err := filepath.EvalSymlinks(filepath.Join(bundle, "work"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	yards := func() []string {
		names, _ := filepath.Glob(filepath.Join(work, ".criu.cgyard.*")) // the pattern is valid
		return names
	}
	if len(yards()) == 0 {
		return nil
	}
	waitProcessesIn(ctx, work) // a CRIU that still lives unmounts them itself
	var errs []error
	for _, name := range yards() {
		errs = append(errs, unmount(name))
	}
	return errors.Join(errs...)
}

// bundleOf is the directory of the container beside which, or in which, the
// process was started.
func bundleOf(id string) (string, error) {
	cwd, err := os.Getwd()
	return filepath.Join(filepath.Dir(cwd), filepath.Base(id)), err
}

// detach unmounts what runc mounts for CRIU (libcontainer/criu_linux.go,
// criuRestore). A bundle lies in a directory with the name of its namespace.
func detach(bundle string) error {
	ns, id := filepath.Base(filepath.Dir(bundle)), filepath.Base(bundle)
	root := process.RuncRoot
	if o, err := runc.ReadOptions(bundle); err != nil {
		return err
	} else if o != nil && o.Root != "" {
		root = o.Root
	}
	return unmount(filepath.Join(root, ns, id, "criu-root"))
}

// unmount detaches what is mounted at target, if anything is.
func unmount(target string) error {
	switch err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err {
	case nil, unix.ENOENT, unix.EINVAL: // EINVAL: not mounted
		return nil
	default:
		return fmt.Errorf("unmount %s: %w", target, err)
	}
}

// removeCgroup kills what is in the container's cgroup and removes it, where it
// is still there after the container's removal and its path is the container's
// own. A path in systemd's form is a scope, which systemd removes.
func removeCgroup(ctx context.Context, id string) error {
	dir, err := bundleOf(id)
	if err != nil {
		return err
	}
	spec, err := readSpec(dir)
	if err != nil {
		return err
	}
	if spec.Linux == nil || !filepath.IsAbs(spec.Linux.CgroupsPath) || filepath.Base(spec.Linux.CgroupsPath) != id {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	// What is killed takes a moment to leave, and a CRIU that is about to fail
	// may have made another process meanwhile.
	var last error
	err = poll(ctx, "go", func(int) (bool, error) {
		gone, err := tryRemoveCgroup(filepath.Clean(spec.Linux.CgroupsPath))
		last = err
		return gone, nil
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// tryRemoveCgroup tells whether the cgroup was gone already.
func tryRemoveCgroup(path string) (gone bool, err error) {
	if cgroups.Mode() == cgroups.Unified {
		if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", path)); errors.Is(err, os.ErrNotExist) {
			return true, nil
		}
		c, err := cgroup2.Load(path)
		if err != nil {
			return false, err
		}
		return false, errors.Join(c.Kill(), c.Delete())
	}
	c, err := cgroup1.Load(cgroup1.StaticPath(path))
	if errors.Is(err, cgroup1.ErrCgroupDeleted) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, errors.Join((&cgroup{v1: c}).killAll(), c.Delete())
}

// release kills everything of the container, frozen or not. It finds the cgroup
// by the first process, whose id runc left in the bundle; the current directory
// is a bundle beside it.
//
// Where that process is dead there is nothing to do, as after every ordinary
// end: a first process that is frozen is not dead on cgroup v1, and takes the
// others with it on v2.
func release(id string) error {
	dir, err := bundleOf(id)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, "init.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil // never started
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil {
		return fmt.Errorf("init.pid: %w", err)
	}
	group, err := freezerPath(pid)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil // it is dead
	}
	if err != nil {
		return err
	}
	if !strings.Contains(filepath.Base(containerGroup(group, id)), id) {
		return nil // the pid is another's by now
	}
	cg, err := loadCgroup(pid, id)
	if err != nil {
		return err
	}
	endCheckpoints(id)
	return errors.Join(cg.killAll(), thaw(cg))
}

// endCheckpoints kills the runc processes that checkpoint the container, and
// their CRIUs. Their victims are to die too.
func endCheckpoints(id string) {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	var runcs []string
	for _, name := range names {
		args := commandLine(name)
		if len(args) > 2 && args[len(args)-1] == id && slices.Contains(args, "checkpoint") {
			runcs = append(runcs, filepath.Base(filepath.Dir(name)))
		}
	}
	for _, runc := range runcs {
		children, _ := filepath.Glob("/proc/" + runc + "/task/*/children")
		pids := []string{runc}
		for _, name := range children {
			b, _ := os.ReadFile(name)
			pids = append(pids, strings.Fields(string(b))...)
		}
		// CRIU first: it must not see its runc end and go on alone.
		for _, p := range slices.Backward(pids) {
			if pid, err := strconv.Atoi(p); err == nil {
				unix.Kill(pid, unix.SIGKILL) // an error means that it is gone
			}
		}
	}
}

func commandLine(name string) []string {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil // gone
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}
