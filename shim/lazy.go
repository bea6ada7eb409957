package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/restore"
	"github.com/stasis-containers/stasis/pkg/restore/pager"
)

// A container's memory is filled by a pager in the shim, see package pager,
// most of it while its tasks run already. Memory that nobody can fill any more must never
// be read, for it reads as zero once the last descriptor of it is closed. So
// whoever holds the descriptors kills the container first: the shim, where the
// pager fails; the holder, a child of the shim that has copies of them, where
// the shim dies. The shim ends the holder when memory is full.
//
// The checkpoint stays claimed until then. A shim that dies loses its claim, so
// that the container goes on from the checkpoint once more; a failure of the
// pager quarantines it, like one of CRIU; and once memory is full, or the
// container has ended by itself, it is consumed. Lest a pager that takes its
// shim along does so again and again, that once more is without a pager: a file
// in the runtime directory tells that there has been one.

const (
	// minLazyBytes: a pager costs the start of a process, 5 to 45 ms of a
	// processor, and faults. CRIU reads 0.2 to 0.5 GB/s, so at least 64 ms of
	// this much: enough that it pays on a slow day, too.
	minLazyBytes = 32 << 20
	// fillTimeout, and the time for the memory at fillRate in bytes per second,
	// bound the whole, from the start of the pager on; stallTimeout the time
	// without any progress. Only a disk that is about to fail comes near.
	fillTimeout  = 10 * time.Minute
	fillRate     = 20 << 20
	stallTimeout = 2 * time.Minute
	// restDelay is what runc takes to finish after CRIU, and a request that the
	// container has been waited for with.
	restDelay = 50 * time.Millisecond
	// holderName is the program name that makes a shim a holder.
	holderName = "stasis-memory-holder"
)

var errHolder = errors.New("the holder of its memory has ended")

// Reasons for CRIU to read memory that no user needs to be told of.
const (
	eagerChosen = "not lazy by " + checkpoint.AnnotationMemory + " or the daemon's --memory"
	eagerSmall  = "little memory"
)

// eagerBecause says why CRIU is to read a container's memory before it lets the
// tasks run; "" where a pager may fill it meanwhile.
func eagerBecause(m *checkpoint.Manifest, c *container, criuVersion string) string {
	spec := c.spec
	total := m.ResidentBytes()
	switch used := m.Sizes.InUseBytes; {
	case c.settings.Memory != checkpoint.MemoryLazy && c.settings.Memory != checkpoint.MemoryMapped:
		return eagerChosen
	case total < minLazyBytes:
		return eagerSmall
	case !criu.CanLazyRestore(criuVersion):
		return fmt.Sprintf("CRIU %q is not of version 4.2 or later", criuVersion)
	case used == 0:
		return "the checkpoint does not tell how much memory was in use"
	case total > used+used/4+16<<20:
		// CRIU finds out what a child has in common with its parent; a pager
		// would give each a copy.
		return fmt.Sprintf("processes share pages since a fork: %d MiB of images were %d MiB in memory", total>>20, used>>20)
	case spec.Linux == nil || !isContainerGroup(filepath.Base(strings.ReplaceAll(spec.Linux.CgroupsPath, ":", "/")), c.id):
		return "its cgroup does not name the container" // which could not be found to be killed
	case restore.HasUserNamespace(spec):
		return "a user namespace has no right to a userfaultfd"
	}
	if r := spec.Linux.Resources; r != nil && r.Memory != nil && r.Memory.Limit != nil {
		// With all of it there before the start, a failure is a cold start; later
		// it would be the end of a container that has acted.
		if limit := *r.Memory.Limit; limit > 0 && limit < total+total/8 {
			return fmt.Sprintf("the memory limit of %d MiB is near to the %d MiB of the images", limit>>20, total>>20)
		}
	}
	return ""
}

// lazyRestore is the filling of one container's memory.
type lazyRestore struct {
	id    string
	from  *pendingRestore
	pager *pager.Pager
	end   context.CancelCauseFunc // of the pager
	// The pager was started, and was there for so long before the inner Start.
	started time.Time
	early   time.Duration

	holder *os.Process
	exited chan struct{} // closed when the holder is gone
	conn   *net.UnixConn // to the holder

	done chan struct{} // closed when memory is full, or the container is dead
	err  error         // valid then
}

// lazyStart is the start of a pager beside the preparation of the restore, which
// takes about as long.
type lazyStart struct {
	at   time.Time
	done chan struct{}
	lazy *lazyRestore // valid once done is closed, like err
	err  error
}

// maxEarly bounds the time for which a pager that was started in Create waits for
// Start, to a small part of what CRIU has from its start on.
const maxEarly = 10 * time.Second

// endWait bounds the time for which a rollback waits for a pager to end.
const endWait = 5 * time.Second

// failWait is how long a start may go on without its pager: CRIU commonly finds out at once.
const failWait = 2 * time.Second

// watchStart has the container of a start killed whose pager has failed and that does not
// end: a task that touches a page which is missing waits for ever then, and CRIU for the
// task. stop ends that.
func (l *lazyRestore) watchStart(ctx context.Context, kill func(ctx context.Context, id string) error) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() {
		failed := make(chan error, 1)
		running.Go(func() { failed <- l.pager.Wait(ctx) })
		select {
		case <-l.exited:
		case err := <-failed:
			if err == nil {
				return // memory is full
			}
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(failWait):
		case <-ctx.Done():
			return
		}
		log.G(ctx).Warn("the restore does not end without its pager: its tasks are killed")
		if err := kill(ctx, l.id); err != nil {
			log.G(ctx).WithError(err).Debug("kill tasks of a restore")
		}
	})
	return func() { cancel(); running.Wait() }
}

// startLazy starts the pager of a restore that may have one. It is to be begun
// or ended.
func (s *service) startLazy(ctx context.Context, c *container, p *pendingRestore) {
	if p.eager == "" && s.died(p) {
		p.eager = "the last container that it was filled for died with its shim"
	}
	if p.eager != "" {
		return
	}
	l := &lazyStart{at: time.Now(), done: make(chan struct{})}
	p.start = l
	go func() { // reads some images, and ends
		defer close(l.done)
		l.lazy, l.err = s.startPager(ctx, c, p)
	}()
}

// endStart ends a pager that was started and has not begun.
func (p *pendingRestore) endStart(ctx context.Context) {
	l := p.start
	if l == nil {
		return
	}
	p.start = nil
	ended := make(chan struct{})
	go func() { // as long as the disk takes, which the caller may not have
		defer close(ended)
		if <-l.done; l.err != nil {
			return // there is none
		}
		if err := l.lazy.close(); err != nil {
			log.G(ctx).WithError(err).Warn("close pager")
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, endWait) // of a rollback more is to be done
	defer cancel()
	select {
	case <-ended:
	case <-ctx.Done():
	}
}

// beginLazy makes ready for a restore with a pager, or returns nil where CRIU
// is to read memory itself.
func (s *service) beginLazy(ctx context.Context, c *container, p *pendingRestore) *lazyRestore {
	if p.start != nil && time.Since(p.start.at) > maxEarly {
		p.endStart(ctx)
	}
	if p.start == nil {
		s.startLazy(ctx, c, p)
	}
	if p.eager != "" {
		return nil
	}
	select {
	case <-p.start.done:
	case <-ctx.Done():
		p.endStart(ctx)
		p.eager = fmt.Sprintf("no pager in time: %v", ctx.Err())
		return nil
	}
	l, err := p.start.lazy, p.start.err
	p.start = nil
	if err == nil {
		if err = s.mark(p); err != nil {
			err = errors.Join(err, l.close())
		}
	}
	if err == nil {
		o := p.plan.CRIU
		o.LazyPages = true
		if err = c.writeCRIUConfig(o); err != nil {
			err = errors.Join(err, l.close())
		}
	}
	if err != nil {
		p.eager = err.Error()
		return nil
	}
	l.early = time.Since(l.started)
	c.mu.Lock()
	c.lazy = l
	c.mu.Unlock()
	return l
}

// lazyMark is the file that exists while a pager fills memory from a checkpoint
// that only one container is restored from, and after the shim's death.
func (s *service) lazyMark(p *pendingRestore) string {
	return filepath.Join(s.config.RuntimeDir, "lazy", string(p.claim.ID()))
}

// died tells whether an earlier shim died while it filled memory from the
// checkpoint. Where that cannot be known it may have.
func (s *service) died(p *pendingRestore) bool {
	_, err := os.Lstat(s.lazyMark(p))
	return !errors.Is(err, os.ErrNotExist)
}

func (s *service) mark(p *pendingRestore) error {
	if p.claim.Manifest().Template != "" {
		return nil // which others may be restored from just now
	}
	name := s.lazyMark(p)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return fmt.Errorf("mark: %w", err)
	}
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		return fmt.Errorf("mark: %w", err)
	}
	return nil
}

// unmark is called when the checkpoint is not claimed any more.
func (s *service) unmark(ctx context.Context, p *pendingRestore) {
	if err := os.Remove(s.lazyMark(p)); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.G(ctx).WithError(err).Warn("remove mark of a lazy restore")
	}
}

func (s *service) startPager(ctx context.Context, c *container, p *pendingRestore) (_ *lazyRestore, err error) {
	// As far as the shim may; whether CRIU's tasks may is up to the kernel, too.
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return nil, fmt.Errorf("userfaultfd: %w", errno)
	}
	unix.Close(int(fd))
	// containerd makes it a link to a directory that outlives the bundle.
	work, err := filepath.EvalSymlinks(filepath.Join(c.bundle, "work"))
	if err != nil {
		return nil, fmt.Errorf("work directory: %w", err)
	}
	l := &lazyRestore{id: c.id, from: p, done: make(chan struct{})}
	life, end := context.WithCancelCause(log.WithLogger(s.ctx, log.G(ctx)))
	limit := fillTimeout + time.Duration(p.claim.Manifest().ResidentBytes()/fillRate)*time.Second
	life, cancel := context.WithTimeoutCause(life, limit, fmt.Errorf("not full after %v", limit))
	l.end = func(cause error) { end(cause); cancel() }
	if err := l.startHolder(); err != nil {
		l.end(nil)
		return nil, fmt.Errorf("holder: %w", err)
	}
	hot := s.hot(ctx, p)
	l.started = time.Now()
	l.pager, err = pager.Start(life, pager.Options{
		ImageDir:     filepath.Join(p.claim.Dir(), checkpoint.ImageDir),
		WorkDir:      work,
		StallTimeout: stallTimeout,
		RestDelay:    restDelay,
		Hot:          hot,
		Keeper:       pager.NewKeeper(l.conn),
		Blocks:       p.claim.Manifest().Blocks(),
	})
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

// startHolder starts a process that holds what the pager holds.
func (l *lazyRestore) startHolder() error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "holder"), os.NewFile(uintptr(fds[1]), "shim")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return err
	}
	l.conn = conn.(*net.UnixConn)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return errors.Join(err, l.conn.Close())
	}
	defer null.Close()
	l.holder, err = os.StartProcess("/proc/self/exe", []string{holderName, l.id}, &os.ProcAttr{
		Env:   os.Environ(),
		Files: []*os.File{null, null, null, theirs},
		Sys:   &syscall.SysProcAttr{Setsid: true}, // no signal for the shim's group reaches it
	})
	if err != nil {
		return errors.Join(err, l.conn.Close())
	}
	l.exited = make(chan struct{})
	go func() { // ends with the holder, which close kills
		// It says nothing, and its end of the connection is its alone. The
		// shim's loop reaps it.
		io.Copy(io.Discard, l.conn)
		close(l.exited)
		l.end(errHolder)
	}()
	return nil
}

// close ends the holder and the pager. Memory must be full, or the container dead.
func (l *lazyRestore) close() error {
	l.end(nil)
	// An error means that it is gone.
	l.holder.Kill()
	<-l.exited
	err := errors.Join(l.conn.Close(), l.holder.Release())
	if l.pager != nil {
		err = errors.Join(err, l.pager.Close())
	}
	return err
}

// ran tells whether tasks may have run code of the application.
func (l *lazyRestore) ran() bool { return isClosed(l.pager.Restored()) }

// follow waits until memory is full, and consumes the checkpoint. Where it
// cannot be filled the container is killed, and the checkpoint set aside.
func (s *service) follow(ctx context.Context, c *container, l *lazyRestore) {
	p := l.from
	ctx = log.WithLogger(s.ctx, log.G(ctx))
	l.err = l.pager.Wait(ctx)
	if l.err != nil {
		l.err = fmt.Errorf("memory: %w", l.err)
		if err := killContainer(ctx, l.id); err != nil || ctx.Err() != nil {
			return // the shim ends; the holder goes on
		}
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	if l.err == nil {
		st := l.pager.Stats()
		log.G(ctx).WithFields(log.Fields{
			"op": "fill", "duration_ms": st.Filled.Milliseconds(), "size_bytes": st.CopiedBytes,
			"early_bytes": st.EarlyBytes,
			"faults":      st.Faults, "hot_ranges": st.HotRanges, "verify_ms": p.verify.Milliseconds(), "criu_ms": (st.Restored - l.early).Milliseconds(),
		}).Info("memory is full")
		s.recordHot(cleanup, l)
		if err := p.claim.Consume(cleanup); err != nil {
			log.G(ctx).WithError(err).Error("consume checkpoint")
		}
	} else {
		code := "pager"
		if errors.Is(l.err, checkpoint.ErrCorrupt) {
			code = "corrupt"
		}
		s.event(cleanup, c, event.Event{Type: event.RestoreFail, CheckpointID: p.claim.ID(), Reason: l.err.Error(), ReasonCode: code})
		s.setAside(cleanup, c, p, code, l.err)
	}
	s.unmark(cleanup, p)
	if err := l.close(); err != nil {
		log.G(ctx).WithError(err).Warn("close pager")
	}
	close(l.done)
}

// abandonLazy ends the pager of a restore that failed, if there is one, once
// nothing is left of the container.
func (s *service) abandonLazy(ctx context.Context, c *container) error {
	c.mu.Lock()
	l := c.lazy
	c.mu.Unlock()
	if l == nil {
		return nil
	}
	if err := killContainer(ctx, l.id); err != nil {
		return err
	}
	c.mu.Lock()
	c.lazy = nil
	c.mu.Unlock()
	if err := l.close(); err != nil {
		log.G(ctx).WithError(err).Warn("close pager")
	}
	s.unmark(ctx, l.from)
	l.err = errors.New("the restore failed")
	close(l.done)
	return nil
}

// restoreEagerly restores once more, with CRIU reading the memory, after a
// restore with a pager that let no task run.
//
// Where it leaves no inner object behind, end is what ends the exchange for one
// that the caller makes.
func (s *service) restoreEagerly(ctx context.Context, c *container, p *pendingRestore, r *taskAPI.StartRequest) (resp *taskAPI.StartResponse, end func(), err error) {
	if err := p.verifyAll(ctx); err != nil {
		return nil, nil, err
	}
	end = c.beginExchange()
	s.publisher.muteDelete(c.id)
	if err := s.deleteUnstarted(ctx, c); err != nil {
		s.publisher.drop(c.id) // no event will come
		end()
		return nil, nil, err
	}
	if err := errors.Join(s.abandonLazy(ctx, c), c.writeCRIUConfig(p.plan.CRIU)); err != nil {
		return nil, end, err
	}
	if _, err := s.createFrom(ctx, c, p); err != nil {
		return nil, end, err
	}
	err = c.mountTmpfs(p.plan)
	end()
	if err == nil {
		resp, err = s.startInner(ctx, c, r)
	}
	return resp, nil, err
}

// endLazy waits, within limits, until nothing is to be done any more for the
// memory of a container that is gone: what is left of its checkpoint must not
// be taken for that of a dead shim.
func (s *service) endLazy(ctx context.Context, c *container) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	if err := c.waitFull(ctx); err != nil && ctx.Err() != nil {
		log.G(ctx).WithError(err).Error("the pager does not end")
	}
}

// waitFull waits until the container's memory is full, if that is to be waited
// for: what is missing would be missing in a dump.
func (c *container) waitFull(ctx context.Context) error {
	c.mu.Lock()
	l := c.lazy
	c.mu.Unlock()
	if l == nil {
		return nil
	}
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return fmt.Errorf("wait until memory is full: %w", ctx.Err())
	}
}

// HoldMemory does the work of a holder, if this process is one: it holds what
// the shim gives it and kills the container when the shim dies. It reports
// whether it is one, when it is done.
func HoldMemory() bool {
	if len(os.Args) != 2 || os.Args[0] != holderName {
		return false
	}
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE)
	_ = unix.CloseRange(firstInherited, 1<<32-1, 0) // that another container's CRIU is to have
	f := os.NewFile(3, "shim")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return true // nobody gives anything
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return true
	}
	held := pager.Hold(unixConn)
	// The shim kills this process where nothing is to be done. So that it has
	// ended is enough, for a descriptor may have been on its way.
	_ = held.Wait(context.Background())
	_ = killContainer(context.Background(), os.Args[1])
	_ = held.Close()
	return true
}

// killContainer kills all processes of a container and returns when they are
// gone, or with the context's error. It needs neither runc nor the container's
// first process, which may not be known yet.
func killContainer(ctx context.Context, id string) error {
	for wait := time.Millisecond; ; wait = min(2*wait, time.Second) {
		pids, err := processesOf(id)
		if err != nil {
			log.G(ctx).WithError(err).Error("list processes of the container")
		} else if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			kill9(pid, id)
		}
		if len(pids) > 0 && wait > 10*time.Millisecond {
			// Version 1 delivers no signal to who is frozen.
			if cg, err := loadCgroup(pids[0], id); err == nil {
				cg.thaw()
			}
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("kill container: %w", ctx.Err())
		}
	}
}

// processesOf lists the processes in a container's cgroup that are not dead.
func processesOf(id string) (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && pid != os.Getpid() && isOf(pid, id) && runs(pid) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// isOf tells whether a process is in the cgroup that runc made for the
// container, or in one below it.
func isOf(pid int, id string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false // gone
	}
	if inGroup(string(b), id) {
		return true
	}
	// On version 1 a first thread that has ended is in the root, while others
	// may run.
	if state := taskState(fmt.Sprintf("/proc/%d/stat", pid)); state != 'Z' && state != 'X' {
		return false
	}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/cgroup", pid))
	for _, name := range threads {
		if b, err := os.ReadFile(name); err == nil && inGroup(string(b), id) {
			return true
		}
	}
	return false
}

// inGroup is isOf for the content of a process's file cgroup in /proc.
func inGroup(file, id string) bool {
	for line := range strings.Lines(file) {
		// hierarchy:controllers:path
		if parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(parts) == 3 {
			for name := range strings.SplitSeq(parts[2], "/") {
				if isContainerGroup(name, id) {
					return true
				}
			}
		}
	}
	return false
}

// runs tells whether one of a process's threads is not dead.
func runs(pid int) bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, name := range tasks {
		if s := taskState(name); s != 0 && s != 'Z' && s != 'X' {
			return true
		}
	}
	return false
}

// taskState is the letter for a task's state in its file stat in /proc, 0 if it
// is gone.
func taskState(name string) byte {
	b, err := os.ReadFile(name)
	if err != nil {
		return 0
	}
	// pid (name) state; the name may hold anything.
	if _, state, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " "); ok && state != "" {
		return state[0]
	}
	return '?'
}

// kill9 kills a process of the container, and no other that got its number.
func kill9(pid int, id string) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // gone
	}
	defer unix.Close(fd)
	if isOf(pid, id) {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // an error means that it is gone
	}
}
