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

	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// NewManager makes a manager of shims clean up after a shim that died in the
// middle of a dump: containerd then calls the shim's binary to remove what is
// left of each of its containers.
func NewManager(inner shim.Shim) shim.Shim { return manager{inner} }

type manager struct{ shim.Shim }

// Stop removes the container. Its processes may be frozen, and a runc and a CRIU
// may be at work that outlived the shim: at its end CRIU freezes again what it
// found frozen, and on cgroup v1 a frozen process does not even die. So these
// two end first, then the processes.
func (m manager) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	if err := release(id); err != nil {
		log.G(ctx).WithField("container_id", id).WithError(err).Warn("release container of a dead shim")
	}
	return m.Shim.Stop(ctx, id)
}

// release kills everything of the container, frozen or not. It finds the cgroup
// by the first process, whose id runc left in the bundle; the current directory
// is a bundle beside it.
//
// Where that process is dead there is nothing to do, as after every ordinary
// end: a first process that is frozen is not dead on cgroup v1, and takes the
// others with it on v2.
func release(id string) error {
	cwd, err := os.Getwd()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(cwd), filepath.Base(id), "init.pid"))
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
