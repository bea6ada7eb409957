package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	eventstypes "github.com/containerd/containerd/api/events"
	cdruntime "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/oom"
	oomv1 "github.com/containerd/containerd/v2/pkg/oom/v1"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// cgroup is a container's cgroup of either version. The inner service has one
// only for containers that runc created, not for restored ones, and cannot be
// asked for it while it dumps.
type cgroup struct {
	v1 cgroup1.Cgroup
	v2 *cgroup2.Manager

	events string // v2: the file that tells whether the freeze is complete
	state  string // v1: the file that freezes, thaws and tells
}

// loadCgroup finds the cgroup of a container by one of its processes. It refuses one that the shim is in
// itself: on v1 a process that has exited counts to the root, and a freeze or
// kill there would hit the whole node.
func loadCgroup(pid int, id string) (*cgroup, error) {
	group, err := freezerPath(pid)
	group = containerGroup(group, id)
	if err != nil {
		return nil, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	own, err := freezerPath(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("cgroup of the shim: %w", err)
	}
	if below(own, group) {
		return nil, fmt.Errorf("cgroup of pid %d is %s, which holds the shim too", pid, group)
	}
	c := &cgroup{}
	if cgroups.Mode() == cgroups.Unified {
		c.events = filepath.Join("/sys/fs/cgroup", group, "cgroup.events")
		c.v2, err = cgroup2.Load(group)
	} else {
		path := cgroup1.PidPath(pid)
		c.v1, err = cgroup1.Load(func(n cgroup1.Name) (string, error) {
			p, err := path(n)
			return containerGroup(p, id), err
		})
		if err == nil {
			c.state, err = freezerState(c.v1, group)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	return c, nil
}

// freezerState is the path of a v1 cgroup's file freezer.state.
func freezerState(c cgroup1.Cgroup, group string) (string, error) {
	for _, s := range c.Subsystems() {
		if p, ok := s.(interface{ Path(string) string }); ok && s.Name() == cgroup1.Freezer {
			return filepath.Join(p.Path(group), "freezer.state"), nil
		}
	}
	return "", errors.New("no freezer is mounted")
}

// freezerPath is the path of a process's cgroup in the hierarchy that freezes.
func freezerPath(pid int) (string, error) {
	if cgroups.Mode() == cgroups.Unified {
		return cgroup2.PidGroupPath(pid)
	}
	return cgroup1.PidPath(pid)(cgroup1.Freezer)
}

// containerGroup is the cgroup that runc made for the container: a process may
// have moved to one below it, as systemd does, and to freeze or kill that one
// would not be enough. Where the path does not name the container it is taken
// as it is.
func containerGroup(path, id string) string {
	parts := strings.Split(path, "/")
	for i, name := range slices.Backward(parts) {
		if isContainerGroup(name, id) {
			return strings.Join(parts[:i+1], "/")
		}
	}
	return path
}

// isContainerGroup tells whether a cgroup's name is what runc calls that of the container.
func isContainerGroup(name, id string) bool {
	return name == id || strings.HasSuffix(name, "-"+id+".scope")
}

// below tells whether a path is dir or lies in it.
func below(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// stat returns the metrics in the type that the inner service would return.
func (c *cgroup) stat() (any, error) {
	if c.v2 != nil {
		return c.v2.Stat()
	}
	return c.v1.Stat(cgroup1.IgnoreNotExist)
}

func (c *cgroup) pids() ([]uint32, error) {
	var pids []uint32
	if c.v2 != nil {
		procs, err := c.v2.Procs(true)
		if err != nil {
			return nil, err
		}
		for _, p := range procs {
			pids = append(pids, uint32(p))
		}
		return pids, nil
	}
	// The freezer is the hierarchy that runc always joins and that the dump
	// itself depends on.
	procs, err := c.v1.Processes(cgroup1.Freezer, true)
	if err != nil {
		return nil, err
	}
	for _, p := range procs {
		pids = append(pids, uint32(p.Pid))
	}
	return pids, nil
}

// freeze returns when all tasks are frozen, or with an error after
// freezeTimeout: a task in an uninterruptible wait does not freeze. After an
// error the caller thaws. runc would do the same, in a process of its own that
// takes longer than the freeze.
func (c *cgroup) freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	if c.v2 == nil {
		return freezeV1(ctx, c.state)
	}
	if err := c.v2.Freeze(); err != nil {
		return err
	}
	return waitFrozen(ctx, c.events)
}

// freezeTimeout bounds one freeze or thaw.
const freezeTimeout = 10 * time.Second

// waitFrozen waits for v2, where the kernel takes the order and carries it out
// afterwards; only cgroup.events tells when it has.
func waitFrozen(ctx context.Context, events string) error {
	return poll(ctx, "freeze", func(int) (bool, error) {
		b, err := os.ReadFile(events)
		return strings.Contains(string(b), "frozen 1"), err
	})
}

// freezeV1 repeats the order until the kernel says that it is carried out. The
// v1 freezer may remain in the middle, for example when a process forks
// meanwhile; running again for a moment gets it out.
func freezeV1(ctx context.Context, state string) error {
	return poll(ctx, "freeze", func(try int) (bool, error) {
		if try%50 == 49 {
			if err := os.WriteFile(state, []byte("THAWED"), 0); err != nil {
				return false, err
			}
			time.Sleep(10 * time.Millisecond)
		}
		return orderV1(state, "FROZEN")
	})
}

// orderV1 writes the state and reports whether it was reached.
func orderV1(state, want string) (bool, error) {
	if err := os.WriteFile(state, []byte(want), 0); err != nil {
		return false, err
	}
	b, err := os.ReadFile(state)
	return strings.TrimSpace(string(b)) == want, err
}

// poll calls done each millisecond until it is true.
func poll(ctx context.Context, what string, done func(try int) (bool, error)) error {
	for try := 0; ; try++ {
		if ok, err := done(try); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the cgroup does not %s: %w", what, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// forkSyscalls are the system calls in which a task waits for a vforked child.
var forkSyscalls = map[string]bool{
	"435":                        true, // clone3, on every architecture
	strconv.Itoa(unix.SYS_CLONE): true,
}

func init() {
	if runtime.GOARCH == "amd64" {
		forkSyscalls["58"] = true // vfork
	}
}

// inVfork tells whether a frozen task seems to wait for a child that shares its
// memory. CRIU cannot stop such a task: it stops the child before its exec, and
// the parent waits for that exec without being interruptible, until CRIU's
// timeout (compel/src/lib/infect.c, compel_wait_task). The answer is read from
// /proc, where a task on its way out of fork looks the same; a false alarm
// costs a few milliseconds.
func (c *cgroup) inVfork() (bool, error) {
	pids, err := c.pids()
	if err != nil {
		return false, err
	}
	for _, pid := range pids {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
		for _, name := range tasks {
			b, err := os.ReadFile(name)
			if err != nil {
				continue // gone
			}
			if nr, _, _ := strings.Cut(string(b), " "); forkSyscalls[nr] {
				return true, nil
			}
		}
	}
	return false, nil
}

// leaveVfork lets a frozen cgroup run for moments until no task of it is in
// the middle of a vfork. It leaves the cgroup frozen, also where it gives up;
// after an error the caller thaws.
func (c *cgroup) leaveVfork(ctx context.Context) error {
	for wait := time.Millisecond; wait < time.Second; wait *= 2 {
		in, err := c.inVfork()
		if err != nil || !in {
			return err
		}
		if err := c.thaw(); err != nil {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		if err := c.freeze(ctx); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil // a long vfork: CRIU will say what it thinks of it
}

// thaw has a deadline of its own: no caller may skip it.
func (c *cgroup) thaw() error {
	if c.v2 != nil {
		return c.v2.Thaw()
	}
	ctx, cancel := context.WithTimeout(context.Background(), freezeTimeout)
	defer cancel()
	return poll(ctx, "thaw", func(int) (bool, error) { return orderV1(c.state, "THAWED") })
}

// killAll sends SIGKILL to every process of the cgroup. Done while frozen, no
// process runs another instruction of its own after the thaw.
func (c *cgroup) killAll() error {
	if c.v2 != nil {
		return c.v2.Kill()
	}
	pids, err := c.pids()
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pids {
		if err := unix.Kill(int(p), unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill %d: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// memoryBytes is the memory in use, an upper bound of what a dump writes.
func (c *cgroup) memoryBytes() (int64, error) {
	if c.v2 != nil {
		s, err := c.v2.Stat()
		if err != nil {
			return 0, err
		}
		return int64(s.GetMemory().GetAnon() + s.GetMemory().GetShmem() + s.GetMemory().GetSwapUsage()), nil
	}
	s, err := c.v1.Stat(cgroup1.IgnoreNotExist)
	if err != nil {
		return 0, err
	}
	m := s.GetMemory()
	return int64(m.GetTotalRSS() + m.GetTotalMappedFile()), nil
}

// oomWatcher reports OOM kills of restored containers; those that runc created
// are watched by the inner service.
type oomWatcher struct {
	publisher *publisher
	v1        oom.Watcher // nil on cgroup v2
}

func newOOMWatcher(ctx context.Context, p *publisher) *oomWatcher {
	w := &oomWatcher{publisher: p}
	if cgroups.Mode() == cgroups.Unified {
		return w
	}
	v1, err := oomv1.New(p)
	if err != nil {
		log.G(ctx).WithError(err).Error("no OOM events for restored containers")
		return w
	}
	w.v1 = v1
	go v1.Run(ctx) // ends with the shim's context
	return w
}

func (w *oomWatcher) add(ctx context.Context, id string, c *cgroup) {
	if c.v1 != nil {
		if w.v1 != nil {
			if err := w.v1.Add(id, c.v1); err != nil {
				log.G(ctx).WithError(err).Error("watch oom events")
			}
		}
		return
	}
	events, errs := c.v2.EventChan()
	go w.watch2(context.WithoutCancel(ctx), id, events, errs)
}

// watch2 ends when the cgroup is removed, which closes errs.
func (w *oomWatcher) watch2(ctx context.Context, id string, events <-chan cgroup2.Event, errs <-chan error) {
	var last uint64
	report := func(e cgroup2.Event) {
		if e.OOMKill <= last {
			return
		}
		last = e.OOMKill
		if err := w.publisher.Publish(ctx, cdruntime.TaskOOMEventTopic, &eventstypes.TaskOOM{ContainerID: id}); err != nil {
			log.G(ctx).WithError(err).Error("publish oom event")
		}
	}
	for {
		select {
		case e := <-events:
			report(e)
		case err := <-errs:
			if err != nil {
				log.G(ctx).WithError(err).Debug("oom watch ended")
			}
			// The kill that ended the container comes together with the end.
			select {
			case e := <-events:
				report(e)
			default:
			}
			return
		}
	}
}
