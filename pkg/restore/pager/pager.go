package pager

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

// Options of a pager. The zero value of a number takes the default.
type Options struct {
	// ImageDir holds the images, not links to them.
	ImageDir string
	// WorkDir is the directory in which CRIU works: runc's --work-path, or
	// CRIU's own. CRIU looks for the socket there.
	WorkDir string
	// Threads copy in bulk, each while there is a processor for it that has nothing
	// else to do. Where fewer than two have one, the thread that answers faults
	// copies too, between faults. The default leaves half of the processors to the
	// tasks, and is four at most; a negative number is none.
	Threads int
	// RestoreTimeout bounds the time from the start to CRIU's message that the
	// restore is done; default two minutes.
	RestoreTimeout time.Duration
	// StallTimeout bounds the time in which nothing is filled though something
	// is to be; default 30 s.
	StallTimeout time.Duration
	// Hot is memory that the bulk begins with, see [Pager.Touched], as soon as it is
	// registered: each process's in this order, and all processes' before the rest.
	// What is not in the images is ignored.
	Hot []Range
	// RestDelay is how long, after CRIU's last message, nothing but Hot is copied in
	// bulk, except by processors that have nothing else to do: runc and the first
	// answer come first.
	RestDelay time.Duration
	// Keeper has another process hold every userfaultfd, before anything is read
	// from it and until its memory is full; nil for none.
	Keeper *Keeper

	// Blocks are the files of pages whose content is yet to be checked, by name.
	// Each block of them is, before anything of it gets into a task's memory: in
	// Start where CRIU reads it, else when the pager does. Damage ends the pager
	// with a [checkpoint.ErrCorrupt].
	Blocks map[string]checkpoint.File

	pause time.Duration // between the pieces of the bulk; for tests
}

// Stats are counts since the start.
type Stats struct {
	TotalBytes  uint64 // lazy memory in the images
	CopiedBytes uint64 // more than that after forks, less where memory went away
	ZeroBytes   uint64 // asked for, without content in the images
	Faults      uint64
	Events      uint64 // fork, remap, remove, unmap
	Processes   int    // whose memory was to be filled, children of fork included
	HotRanges   int    // of [Options.Hot] that are in the images
	// EarlyBytes are those of CopiedBytes that were there at CRIU's last message.
	EarlyBytes uint64
	// Restored is the time from the start to CRIU's last message, Filled from
	// there until all was full; 0 before.
	Restored, Filled time.Duration
}

// Rate is the speed of the filling after the restore, in bytes per second.
func (s Stats) Rate() float64 {
	if s.Filled <= 0 {
		return 0
	}
	return float64(s.CopiedBytes-s.EarlyBytes) / s.Filled.Seconds()
}

// ErrNotRestored is in the error of [Pager.Wait] where CRIU can no longer let
// the tasks run: it fails on its own, and there is nothing to be killed.
var ErrNotRestored = errors.New("CRIU has not finished the restore")

// Pager fills the memory of one restore. It is made by [Start].
type Pager struct {
	opt   Options
	mem   *criu.LazyMemory
	total uint64 // bytes of it
	start time.Time

	contents    map[uint32]*content // by process
	epoll, wake int                 // descriptors
	asked       window              // of the server
	ending      context.Context     // done when the pager ends
	stop        context.CancelFunc
	restored    chan struct{} // closed at CRIU's last message
	done        chan struct{} // closed when nothing runs any more
	running     sync.WaitGroup

	helping                                atomic.Int32 // threads that copy in bulk just now, the server aside
	copied, looked, zeroed, faults, events atomic.Uint64
	restoredAt, filledAt, lastFault        atomic.Int64 // ns after start, 0 before

	hotMu       sync.Mutex
	hotSince    time.Time // of the first fault after CRIU's last message
	touched     []Range
	touchedOnce map[Range]bool

	mu    sync.Mutex
	cond  sync.Cond // spaces, more work, or the end
	err   error
	ended bool
	// abandoned: CRIU cannot finish the restore.
	abandoned bool
	ready     bool           // CRIU is done
	rest      bool           // the server may copy what is not hot, too
	spaces    map[int]*space // by descriptor; those that are not yet full
	count     int
	hotRanges int
	early     uint64 // of copied, when CRIU was done
	held      []int  // descriptors that are only kept
}

// Start reads what the images say about lazy memory, and listens for CRIU,
// which may then be started. The pager ends with its context, as after a
// failure; it must be closed in any case, see [Pager.Close].
func Start(ctx context.Context, opt Options) (_ *Pager, err error) {
	if os.Getpagesize() != pageSize {
		return nil, fmt.Errorf("pager: pages of %d bytes: %w", os.Getpagesize(), errdefs.ErrNotImplemented)
	}
	if opt.Threads == 0 {
		opt.Threads = min(runtime.NumCPU()/2, 4)
	}
	opt.Threads = max(opt.Threads, 0)
	if opt.RestoreTimeout <= 0 {
		opt.RestoreTimeout = 2 * time.Minute
	}
	if opt.StallTimeout <= 0 {
		opt.StallTimeout = 30 * time.Second
	}
	p := &Pager{
		opt: opt, start: time.Now(), epoll: -1, wake: -1,
		spaces: map[int]*space{}, touchedOnce: map[Range]bool{},
		restored: make(chan struct{}), done: make(chan struct{}),
	}
	p.cond.L = &p.mu
	p.ending, p.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			p.stop()
			err = errors.Join(fmt.Errorf("pager: %w", err), p.release())
		}
	}()
	if p.mem, err = criu.OpenLazyMemory(opt.ImageDir); err != nil {
		return nil, err
	}
	p.total = p.mem.Bytes()
	if p.contents, err = contentOf(opt.ImageDir, p.mem, opt.Blocks); err != nil {
		return nil, err
	}
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if p.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := p.watch(p.wake); err != nil {
		return nil, err
	}
	l, remove, err := listen(opt.WorkDir)
	if err != nil {
		return nil, err
	}
	if err := control(l, opt.Keeper.holdSocket); err != nil {
		return nil, errors.Join(fmt.Errorf("keep socket: %w", err), l.Close(), remove())
	}
	p.running.Add(3 + opt.Threads)
	go func() { defer p.running.Done(); p.readAhead() }()
	go func() { defer p.running.Done(); p.receive(l, remove) }()
	go func() { defer p.running.Done(); p.serve() }()
	for range opt.Threads {
		go func() { defer p.running.Done(); p.help() }()
	}
	unhook := context.AfterFunc(ctx, func() { p.end(context.Cause(ctx)) })
	go func() {
		p.running.Wait()
		unhook()
		p.mu.Lock()
		if p.abandoned {
			// CRIU's restorer may wait for a page, and is to find out instead.
			// Errors do not matter: whoever keeps them is about to be ended.
			p.opt.Keeper.releaseAll()
			p.closeSpaces()
		}
		p.mu.Unlock()
		close(p.done)
	}()
	return p, nil
}

// readAhead has the kernel read what it has not in memory, beside what CRIU does.
func (p *Pager) readAhead() {
	for _, t := range p.mem.Tasks {
		if t.Pages != nil {
			unix.Fadvise(int(t.Pages.Fd()), 0, 0, unix.FADV_WILLNEED) // a hint
		}
	}
}

// Restored is closed when CRIU has said that the restore is done: the tasks are
// about to run.
func (p *Pager) Restored() <-chan struct{} { return p.restored }

func (p *Pager) isRestored() bool {
	select {
	case <-p.restored:
		return true
	default:
		return false
	}
}

// Wait waits until all memory is full, nil, or for the failure that keeps it
// from becoming so. Then the container must be killed, before [Pager.Close]:
// whoever touches a missing page waits until then. An error that wraps
// [ErrNotRestored] needs no kill.
//
// Memory that is not full must not be dumped: what is missing would be missing
// in the dump.
func (p *Pager) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Stats are the counts of this moment.
func (p *Pager) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Stats{
		TotalBytes: p.total, CopiedBytes: p.copied.Load(), ZeroBytes: p.zeroed.Load(),
		Faults: p.faults.Load(), Events: p.events.Load(), Processes: p.count, HotRanges: p.hotRanges,
		EarlyBytes: p.early,
		Restored:   time.Duration(p.restoredAt.Load()),
	}
	if at := time.Duration(p.filledAt.Load()); at > 0 {
		s.Filled = at - s.Restored
	}
	return s
}

// Close ends the pager and closes all descriptors. Pages that are missing read
// as zero from then on: unless Wait has returned nil or [ErrNotRestored], the
// tasks must be dead.
func (p *Pager) Close() error {
	p.end(errors.New("closed"))
	<-p.done
	return p.release()
}

// release closes whatever is open.
func (p *Pager) release() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	errs := []error{p.closeSpaces()}
	for _, fd := range []*int{&p.epoll, &p.wake} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	if p.mem != nil {
		errs = append(errs, p.mem.Close())
		p.mem = nil
	}
	return errors.Join(errs...)
}

// closeSpaces closes all userfaultfds. The caller holds mu.
func (p *Pager) closeSpaces() error {
	var errs []error
	for fd := range p.spaces {
		errs = append(errs, unix.Close(fd))
	}
	for _, fd := range p.held {
		errs = append(errs, unix.Close(fd))
	}
	clear(p.spaces)
	p.held = nil
	return errors.Join(errs...)
}

// unhold takes a descriptor from those that are only kept.
func (p *Pager) unhold(fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = slices.DeleteFunc(p.held, func(h int) bool { return h == fd })
}

// abandon ends the pager where CRIU cannot finish the restore any more.
func (p *Pager) abandon(err error) {
	p.end(err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.abandoned = true
	p.err = fmt.Errorf("%w: %w", ErrNotRestored, p.err)
}

// atEnd calls f when the pager ends, unless unhooked before.
func (p *Pager) atEnd(f func()) (unhook func() bool) {
	return context.AfterFunc(p.ending, f)
}

// end stops everything, once; err is nil when all is full.
func (p *Pager) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	p.ended = true
	if err != nil {
		p.err = fmt.Errorf("pager: %w", err)
	} else {
		p.filledAt.Store(int64(time.Since(p.start)))
	}
	p.stop()
	p.cond.Broadcast()
	p.wakeServer()
}

// wakeServer makes the server look at everything. The caller holds mu, so that
// the descriptor is not yet closed.
func (p *Pager) wakeServer() {
	if p.wake >= 0 {
		var one [8]byte
		binary.NativeEndian.PutUint64(one[:], 1)
		unix.Write(p.wake, one[:]) // EAGAIN: it is awake already
	}
}

func (p *Pager) watch(fd int) error {
	e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &e); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// add takes charge of an address space and its descriptor.
func (p *Pager) add(s *space) error {
	p.mu.Lock()
	p.spaces[s.fd] = s
	p.count++
	p.mu.Unlock()
	if !isUffd(s.fd) {
		return fmt.Errorf("process %d: descriptor is not a userfaultfd", s.pid)
	}
	if err := p.opt.Keeper.hold(s.fd); err != nil {
		return fmt.Errorf("process %d: keep userfaultfd: %w", s.pid, err)
	}
	if err := p.watch(s.fd); err != nil {
		return err
	}
	p.mu.Lock()
	s.watched = true
	p.cond.Broadcast()
	p.wakeServer()
	p.mu.Unlock()
	return nil
}

// setReady notes that CRIU is done.
func (p *Pager) setReady() {
	p.restoredAt.Store(int64(time.Since(p.start)))
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready = true
	p.early = p.copied.Load()
	close(p.restored)
	if p.rest = p.opt.RestDelay <= 0; !p.rest {
		timer := time.AfterFunc(p.opt.RestDelay, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.rest = true
			p.cond.Broadcast()
			p.wakeServer()
		})
		p.atEnd(func() { timer.Stop() })
	}
	p.cond.Broadcast()
	p.wakeServer()
}

// serve answers faults and follows events.
func (p *Pager) serve() {
	looked, progress, filled := uint64(0), time.Now(), time.Now()
	l := openLoad()
	defer l.close()
	var w window                // of the bulk
	yielded := time.Duration(0) // for the last time
	crowded, checked := false, time.Time{}
	for wait := idleWait; ; {
		due, err := p.poll(wait)
		if err != nil {
			p.end(err)
			return
		}
		p.mu.Lock()
		ended, ready := p.ended, p.ready
		p.mu.Unlock()
		if ended {
			return
		}
		for _, s := range due {
			if err := p.serveSpace(s); err != nil {
				p.end(err)
				return
			}
		}
		// Faults come first, and where there is a crowd, as of containers that are
		// started at once, whatever else there is; but a program is to get all of
		// its memory even if it never stops to have faults.
		joins, yields, changing := p.helping.Load() < enoughHelpers, false, false
		s, hot := p.next()
		quiet := time.Duration(0)
		if s != nil && !hot { // what is hot is about to be asked for
			quiet = p.quietIn()
		}
		if joins && s != nil && (len(due) == 0 && quiet == 0 || time.Since(filled) > busyTime) {
			if !hot && time.Since(filled) <= busyTime && p.sinceRestored() < crowdTime {
				if now := time.Now(); now.Sub(checked) > retryWait {
					crowded, checked = l.crowded(crowdEach, false), now
				}
				yields = crowded
			}
			if !yields {
				filled = time.Now()
				err := p.piece(s, &w, p.chunk())
				// Where it is changing the event that tells how comes soon.
				changing = errors.Is(err, errChanging)
				if err != nil && !errors.Is(err, errNotNow) {
					p.end(err)
					return
				}
			}
		}
		if !yields {
			yielded = 0
		}
		left, deferred, err := p.finishFull(ready)
		if err != nil {
			p.end(err)
			return
		}
		if ready && left == 0 {
			p.end(nil)
			return
		}
		pause := time.Duration(0)
		if yields {
			// Most crowds are gone in a moment, and a piece is due in any case.
			yielded = min(max(2*yielded, retryWait), busyTime)
			pause = min(yielded, max(busyTime-time.Since(filled), retryWait))
		}
		wait = nextWait(deferred || changing, joins && p.hasNext(), !joins || !ready && p.untried(), pause, quiet)
		if now := p.looked.Load(); now != looked || !ready {
			looked, progress = now, time.Now()
		} else if time.Since(progress) > p.opt.StallTimeout {
			p.end(fmt.Errorf("nothing was filled for %v", p.opt.StallTimeout))
			return
		}
	}
}

// nextWait is for how long the server may sleep. Something is to be tried again
// soon; there is a piece to copy; something may be to be done soon, of which
// nobody tells; the bulk pauses, or has to wait until it is quiet.
func nextWait(again, piece, soon bool, pause, quiet time.Duration) time.Duration {
	switch {
	case again:
		return retryWait
	case pause > 0:
		return pause
	case piece:
		return quiet
	case soon:
		return retryWait
	}
	return idleWait
}

const (
	idleWait  = 100 * time.Millisecond
	retryWait = time.Millisecond
	// A task that has asked for a page commonly asks for the next one at once: for so
	// long after a fault the server copies nothing that nobody waits for, in the time
	// that crowdTime is, too.
	quietTime = 200 * time.Microsecond
	// More than crowdEach threads for each processor are a crowd, such as containers
	// that are started at once, which one on its own commonly is not. To a crowd the
	// bulk gives way, for crowdTime after the restore: memory must become full on a
	// busy machine, too.
	crowdEach = 4
	crowdTime = 3 * time.Second
	// enoughHelpers leave the thread that answers faults nothing to do in bulk.
	enoughHelpers = 2
	// A helper looks for an idle processor again after minCrowded, then after twice
	// as long each time, to maxCrowded.
	minCrowded, maxCrowded = 100 * time.Microsecond, 10 * time.Millisecond
)

// poll returns the spaces that have something to say.
func (p *Pager) poll(wait time.Duration) (due []*space, err error) {
	var events [64]unix.EpollEvent
	n, err := epollWait(p.epoll, events[:], wait)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range events[:max(n, 0)] {
		if int(e.Fd) == p.wake {
			var b [8]byte
			unix.Read(p.wake, b[:])
		} else if s := p.spaces[int(e.Fd)]; s != nil {
			due = append(due, s)
		}
	}
	return due, nil
}

// serveSpace serves a space and takes charge of its children.
func (p *Pager) serveSpace(s *space) error {
	children, err := s.serve()
	if errors.Is(err, errExited) {
		s.setGone()
		err = nil
	}
	for _, c := range children {
		err = errors.Join(err, p.add(c))
	}
	if s.unclaimed() { // an event may have brought something to do
		p.mu.Lock()
		p.cond.Broadcast()
		p.mu.Unlock()
	}
	return err
}

// finishFull closes the descriptors of spaces that are full or gone, and serves
// those that wait for their second try. It returns how many spaces are left.
func (p *Pager) finishFull(ready bool) (left int, deferred bool, err error) {
	p.mu.Lock()
	all := make([]*space, 0, len(p.spaces))
	for _, s := range p.spaces {
		if s.watched {
			all = append(all, s)
		}
	}
	p.mu.Unlock()
	for _, s := range all {
		idle, gone := s.idle()
		if len(s.deferred) > 0 && !gone || idle && ready && !gone {
			// What was told until now comes first: the last news of a full
			// space may be a child.
			if err := p.serveSpace(s); err != nil {
				return 0, false, err
			}
		}
		if closed, err := p.finish(s, ready); err != nil {
			return 0, false, err
		} else if closed {
			continue
		}
		deferred = deferred || len(s.deferred) > 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.spaces), deferred, nil
}

// finish closes a space if nothing is left to be done in it.
func (p *Pager) finish(s *space, ready bool) (bool, error) {
	if idle, gone := s.idle(); !idle && !gone {
		return false, nil // a copy may hold rw
	}
	s.rw.Lock()
	defer s.rw.Unlock()
	idle, gone := s.idle()
	if !gone && (!idle || !ready || len(s.deferred) > 0 || len(s.displaced) > 0) {
		return false, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.spaces, s.fd)
	fd := s.fd
	s.fd = -1
	// Closing does not suffice while another process holds it.
	if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, fd, nil); err != nil {
		p.held = append(p.held, fd)
		return false, fmt.Errorf("epoll: %w", err)
	}
	if err := p.opt.Keeper.release(fd); err != nil {
		p.held = append(p.held, fd)
		return false, fmt.Errorf("process %d: release userfaultfd: %w", s.pid, err)
	}
	if err := unix.Close(fd); err != nil {
		return false, fmt.Errorf("process %d: close userfaultfd: %w", s.pid, err)
	}
	return true, nil
}

// help copies in bulk until the end, while there is a processor for it. It must
// not take one from the tasks, for which a request would wait.
func (p *Pager) help() {
	l := openLoad()
	defer l.close()
	var w window
	helping, wait := false, minCrowded
	is := func(now bool) {
		switch {
		case now && !helping:
			p.helping.Add(1)
		case !now && helping:
			p.helping.Add(-1)
		}
		helping = now
	}
	defer is(false)
	for {
		p.mu.Lock()
		s, _ := p.nextLocked(true)
		for s == nil && !p.ended {
			is(false)
			p.cond.Wait()
			s, _ = p.nextLocked(true)
		}
		ended := p.ended
		p.mu.Unlock()
		if ended {
			return
		}
		if l.crowded(1, true) {
			is(false)
			sleep(wait)
			wait = min(2*wait, maxCrowded)
			continue
		}
		is(true)
		wait = minCrowded
		err := p.piece(s, &w, p.chunk())
		switch {
		case errors.Is(err, errNotNow):
			time.Sleep(retryWait) // the server reads what is changing
		case err != nil:
			p.end(err)
			return
		}
		if idle, _ := s.idle(); idle {
			p.mu.Lock()
			p.wakeServer()
			p.mu.Unlock()
		}
	}
}

// sinceFault is the time since a page was asked for, which is long where none was.
func (p *Pager) sinceFault() time.Duration {
	if at := p.lastFault.Load(); at > 0 {
		return time.Since(p.start) - time.Duration(at)
	}
	return math.MaxInt64
}

// quietIn is how long it takes until no task is likely to ask for its next page at
// once; 0 where that is so, and where memory has been filled for long enough: it must
// become full though a program never stops to have faults.
func (p *Pager) quietIn() time.Duration {
	if p.sinceRestored() > crowdTime {
		return 0
	}
	return max(quietTime-p.sinceFault(), 0)
}

// chunk is the size of the next piece.
func (p *Pager) chunk() uint64 {
	if p.sinceFault() < busyTime {
		return busyChunkSize
	}
	return chunkSize
}

// piece copies one piece of the bulk.
func (p *Pager) piece(s *space, w *window, size uint64) error {
	err := s.bulk(w, size)
	switch {
	case errors.Is(err, errExited):
		s.setGone()
		err = nil
	case errors.Is(err, errUnregistered):
		p.mu.Lock()
		s.retry = time.Now().Add(retryWait)
		p.mu.Unlock()
	case err == nil:
		p.mu.Lock()
		if !p.ready { // that it is registered is news
			p.cond.Broadcast()
		}
		p.mu.Unlock()
	}
	if p.opt.pause > 0 {
		time.Sleep(p.opt.pause)
	}
	return err
}

// next finds a space with something to do now, and tells whether that is memory
// that will be asked for, which comes first; nil for none.
func (p *Pager) next() (s *space, hot bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nextLocked(false)
}

func (p *Pager) hasNext() bool {
	s, _ := p.next()
	return s != nil
}

// untried tells whether there is hot memory that may not be registered yet.
func (p *Pager) untried() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.spaces {
		if waits, hot := s.waits(); waits && hot {
			return true
		}
	}
	return false
}

// sinceRestored is the time since CRIU's last message, negative before it.
func (p *Pager) sinceRestored() time.Duration {
	at := time.Duration(p.restoredAt.Load())
	if at == 0 {
		return -1
	}
	return time.Since(p.start) - at
}

// nextLocked is next for a caller that holds mu. A helper takes also what is not hot
// before its time.
//
// Until CRIU is done no memory may be registered, or only some: what is not is
// tried again.
func (p *Pager) nextLocked(helper bool) (next *space, hot bool) {
	for _, s := range p.spaces {
		waits, hot := s.waits()
		switch {
		case !waits || !s.watched || !p.ready && time.Now().Before(s.retry):
		case hot:
			return s, true
		case p.rest || helper:
			next = s
		}
	}
	return next, false
}
