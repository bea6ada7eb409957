package pager

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	chunkSize     = 256 << 10 // of the bulk
	busyChunkSize = 64 << 10  // of the bulk while there are faults: they wait for it
	busyTime      = 10 * time.Millisecond
	aroundSize    = 64 << 10 // filled at a fault, see around
	callSize      = 64 << 10 // filled by one call of the kernel, see ioctl
	maxMessages   = 64       // read at once
)

var (
	// errNotNow is in the errors after which the same is to be tried again.
	errNotNow = errors.New("not now")
	// errChanging: the address space is being changed; an event tells how.
	errChanging = fmt.Errorf("%w: address space is changing", errNotNow)
	// errUnregistered: CRIU has not yet put the memory into its place.
	errUnregistered = fmt.Errorf("%w: memory is not registered yet", errNotNow)
	// errExited: there is no address space any more.
	errExited = errors.New("process is gone")
)

// space is one address space that is being filled.
type space struct {
	p     *Pager
	pid   uint32 // in the images; of the ancestor, for a child of fork
	child bool   // made by fork
	fd    int    // userfaultfd; -1 once closed
	src   *content
	// The pager's mu guards these: watched tells that the server hears of its events,
	// without which nothing is copied, and retry when to look again for memory that is
	// not registered yet.
	watched bool
	retry   time.Time

	// rw orders copies, which hold it for reading, and the reading of events.
	rw sync.RWMutex
	// spans is where missing pages have their content, by address. It changes
	// with events only, not with the filling. Written by the server, with rw.
	spans []span
	// deferred are addresses of faults to be looked at again. Owned by the server.
	deferred []uint64

	mu      sync.Mutex
	todo    []span // what the bulk has not yet looked at, in its order
	claimed []span // what it has taken of it, and is reading from the images
	claims  uint64 // counts events, which take claims back
	gone    bool   // the process

	// The kernel queues events after the change that they tell of, so those of
	// two threads may come in the wrong order; but it refuses copies until all
	// have been read. An epoch lasts from one copy that it did not refuse to the
	// next one after a change: only events of the same epoch can be in the wrong
	// order. All of these are guarded by mu.
	epoch   uint32
	changed atomic.Bool // in this epoch
	// displaced is content that lay where other content has been moved to: the
	// event is yet to come that says what became of it, before that.
	displaced []span
	// past is content at places from which it has been moved or unmapped: a child
	// whose fork came before that has it there.
	past []span
}

// claim takes a piece of what is to be done. With the events counted it tells
// whether the claim still holds.
//
// It ends where a block of the images does, both being powers of two: the next one
// begins there.
func (s *space) claim(size uint64) (c span, claims uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.todo) == 0 {
		return span{}, 0, false
	}
	first := &s.todo[0]
	c = first.part(first.addr, first.addr+size-uint64(first.off)%size)
	if c.size == first.size {
		s.todo = s.todo[1:]
	} else {
		*first = first.part(c.end(), first.end())
	}
	s.claimed = append(s.claimed, c)
	return c, s.claims, true
}

// unclaim ends a claim of which so much has been done. What is left comes last, or
// where it was.
func (s *space) unclaim(c span, done uint64, last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.claimed = slices.DeleteFunc(s.claimed, func(other span) bool { return other == c })
	if done < c.size && !s.gone {
		at := 0
		if last {
			at = len(s.todo)
		}
		s.todo = slices.Insert(s.todo, at, c.part(c.addr+done, c.end()))
	}
}

// holds tells whether a claim still holds. It does so for as long as the caller
// has rw, which is needed for events, and for closing the descriptor.
func (s *space) holds(claims uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.claims == claims && !s.gone
}

// revoke takes back all claims. The caller holds mu and rw.
func (s *space) revoke() {
	s.claims++
	s.todo = append(s.todo, s.claimed...)
	s.claimed = nil
}

func (s *space) unclaimed() bool {
	waits, _ := s.waits()
	return waits
}

// waits tells whether there is something that the bulk has not yet looked at, and
// whether it is hot.
func (s *space) waits() (waits, hot bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.todo) > 0, len(s.todo) > 0 && s.todo[0].hot
}

func (s *space) setGone() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone, s.todo, s.claimed = true, nil, nil
}

// idle tells whether nothing is to be done, gone whether for want of a process.
func (s *space) idle() (idle, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.todo)+len(s.claimed) == 0, s.gone
}

// bulk fills one piece, if there is one. The window is the caller's.
func (s *space) bulk(w *window, size uint64) error {
	c, claims, ok := s.claim(size)
	if !ok {
		return nil
	}
	content, err := s.load(c, w)
	s.rw.RLock()
	defer s.rw.RUnlock()
	if !s.holds(claims) {
		return nil
	}
	done := uint64(0)
	if err == nil {
		done, _, err = s.fill(c, content)
	}
	s.unclaim(c, done, !errors.Is(err, errUnregistered))
	return err
}

// load reads the content of a span. It stays in the processor's cache, which
// makes this faster than to map the images: that costs page tables and a fault
// for every few pages.
func (s *space) load(c span, w *window) ([]byte, error) {
	b, err := w.read(s.src, c.off, int64(c.size))
	if err != nil {
		return nil, fmt.Errorf("process %d: content of %#x: %w", s.pid, c.addr, err)
	}
	return b, nil
}

// fill gives a span its content, which the buffer holds, except where there are
// pages already. It returns how much of it, from its beginning, needs no more,
// and how many bytes were copied. The caller holds rw, or is the server.
func (s *space) fill(c span, buf []byte) (done, copied uint64, err error) {
	again := false
	for try := c.size; done < c.size; {
		n := min(try, c.size-done, callSize)
		restored := s.p.isRestored() // before: CRIU registers, and then it is done
		filled, errno := uffdCopy(s.fd, c.addr+done, buf[done:done+n])
		done += filled
		copied += filled
		if (filled > 0 || errno != unix.EAGAIN) && s.changed.Load() {
			if err = s.nextEpoch(); err != nil {
				break
			}
		}
		again = again && errno == unix.ENOENT
		switch errno {
		case 0:
			try *= 2
		case unix.EAGAIN:
			if filled == 0 {
				err = errChanging
			}
		case unix.EEXIST:
			done += pageSize
		case unix.ENOENT:
			// The mapping may have been split, by mprotect for one, of which
			// there is no event; a copy must stay within one.
			switch {
			case n > pageSize:
				try = n / 2 &^ (pageSize - 1)
			case !again:
				// If it was unmapped meanwhile, the kernel refuses from now on.
				again = true
				continue
			case !restored:
				err = errUnregistered
			case s.child || c.doubtful: // MADV_DONTFORK, for one
				done += pageSize
				again = false
			default:
				err = fmt.Errorf("process %d: memory at %#x is not registered", s.pid, c.addr+done)
			}
		case unix.ESRCH, unix.ENOSPC:
			err = errExited
		default:
			err = fmt.Errorf("process %d: fill %d bytes at %#x: %w", s.pid, n, c.addr+done, errno)
		}
		if err != nil {
			break
		}
	}
	s.p.copied.Add(copied)
	s.p.looked.Add(done)
	return done, copied, err
}

// serve reads what the kernel has to say and does what it asks for. It must be
// called by the server only. Children of fork are returned, also with an error.
func (s *space) serve() (children []*space, err error) {
	faults := s.deferred
	s.deferred = nil
	var b [maxMessages * messageSize]byte
	s.rw.Lock()
	for err == nil {
		n, rerr := uffdRead(s.fd, b[:])
		if errors.Is(rerr, unix.EINTR) {
			continue
		}
		if errors.Is(rerr, unix.EAGAIN) {
			break
		}
		if rerr == nil && (n == 0 || n%messageSize != 0) {
			rerr = io.ErrUnexpectedEOF
		}
		if rerr != nil {
			err = fmt.Errorf("process %d: read userfaultfd: %w", s.pid, rerr)
			break
		}
		for at := 0; at < n; at += messageSize {
			m := parseMessage(b[at:])
			if m.event == eventPagefault {
				faults = append(faults, m.arg[1]&^(pageSize-1))
				continue
			}
			child, eerr := s.event(m)
			if child != nil {
				children = append(children, child)
			}
			err = errors.Join(err, eerr)
		}
		if n < len(b) {
			break
		}
	}
	s.rw.Unlock()
	for _, addr := range faults {
		if err != nil {
			break
		}
		err = s.fault(addr)
	}
	return children, err
}

// event follows a change of the address space. The caller holds rw.
func (s *space) event(m message) (child *space, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.p.events.Add(1)
	s.revoke()
	switch m.event {
	case eventFork:
		// At once: until then the descriptor is nowhere but here.
		err = s.p.opt.Keeper.hold(int(int32(m.arg[0])))
		child = &space{
			p: s.p, pid: s.pid, child: true, fd: int(int32(m.arg[0])), src: s.src, gone: s.gone,
			spans: slices.Clone(s.spans), todo: slices.Clone(s.todo), epoch: s.epoch,
			displaced: slices.Clone(s.displaced), past: slices.Clone(s.past),
		}
		child.changed.Store(s.changed.Load())
		for _, c := range s.past {
			for _, free := range without(c.addr, c.end(), child.spans) {
				c := c.part(free.addr, free.end())
				child.spans, child.todo = append(child.spans, c), append(child.todo, c)
			}
		}
		sortSpans(child.spans)
		for _, spans := range []*[]span{&child.spans, &child.todo, &child.displaced, &child.past} {
			*spans = slices.DeleteFunc(*spans, func(c span) bool { return c.notInherited })
		}
	case eventRemap:
		from, to, size := m.arg[0], m.arg[1], m.arg[2]
		if from+size < from || to+size < to {
			return nil, fmt.Errorf("process %d: remap of %#x bytes from %#x to %#x", s.pid, size, from, to)
		}
		moved := s.remove(from, from+size)
		s.past = append(s.past, moved...)
		var there []span
		s.spans, there = cut(s.spans, to, to+size)
		s.displaced = append(s.displaced, slices.DeleteFunc(there, func(c span) bool { return c.doubtful })...)
		for i := range moved {
			moved[i].addr += to - from
			moved[i].epoch = s.epoch
		}
		s.put(moved)
		s.again(from, from+size)
		s.again(to, to+size)
		s.changed.Store(true)
	case eventUnmap:
		start, end := m.arg[0], m.arg[1]
		lost := s.remove(start, end)
		s.past = append(s.past, lost...)
		// What was moved here in this epoch may have come after what was
		// unmapped. Then it can be filled; else the kernel will say so.
		lost = slices.DeleteFunc(lost, func(c span) bool { return c.epoch != s.epoch })
		for i := range lost {
			lost[i].doubtful = true
		}
		s.put(lost)
		s.again(start, end)
		s.changed.Store(true)
	case eventRemove:
		s.spans, _ = cut(s.spans, m.arg[0], m.arg[1])
		s.again(m.arg[0], m.arg[1])
	default:
		return nil, fmt.Errorf("process %d: unknown event %#x", s.pid, m.event)
	}
	return child, err
}

// remove takes away the content that an event is about: where some has been
// displaced, it is that. The caller holds mu and rw.
func (s *space) remove(start, end uint64) (removed []span) {
	s.displaced, removed = cut(s.displaced, start, end)
	for _, free := range without(start, end, removed) {
		var inside []span
		s.spans, inside = cut(s.spans, free.addr, free.end())
		removed = append(removed, inside...)
	}
	return slices.Clone(removed)
}

// put adds content where there is none. The caller holds mu and rw.
func (s *space) put(spans []span) {
	if len(spans) > 0 {
		s.spans = append(s.spans, spans...)
		sortSpans(s.spans)
	}
}

// again has the bulk look at a range as it is now. The caller holds mu and rw.
func (s *space) again(start, end uint64) {
	s.todo, _ = cut(s.todo, start, end)
	_, inside := cut(s.spans, start, end)
	s.todo = append(s.todo, inside...)
}

// nextEpoch is called when the kernel did not refuse to copy: all events of
// what changed before have been read. The caller holds rw, at least for reading.
func (s *space) nextEpoch() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.changed.Load() {
		return nil
	}
	s.changed.Store(false)
	s.epoch++
	s.past = nil
	if len(s.displaced) > 0 {
		return fmt.Errorf("process %d: content at %#x was displaced, and nothing tells where to", s.pid, s.displaced[0].addr)
	}
	return nil
}

// fault answers those who wait for a page.
func (s *space) fault(addr uint64) error {
	s.p.lastFault.Store(int64(time.Since(s.p.start)))
	s.p.faults.Add(1)
	c, ok := find(s.spans, addr)
	if !ok {
		return s.zero(addr)
	}
	s.p.touch(s.pid, addr)
	c = around(c, addr)
	content, err := s.load(c, &s.p.asked)
	if err != nil {
		return err
	}
	// The page first: whoever waits for it goes on while the others are copied.
	page := c.part(addr, addr+pageSize)
	of := func(part span) []byte { return content[part.addr-c.addr:][:part.size] }
	_, copied, err := s.fill(page, of(page))
	switch {
	case errors.Is(err, errNotNow):
		s.deferred = append(s.deferred, addr)
		return nil
	case err != nil:
		return err
	case copied < pageSize:
		uffdWake(s.fd, addr, pageSize) // it was there already
	}
	for _, rest := range []span{c.part(page.end(), c.end()), c.part(c.addr, addr)} {
		if _, _, err := s.fill(rest, of(rest)); err != nil && !errors.Is(err, errNotNow) { // nobody waits for them
			return err
		}
	}
	return nil
}

// around is what of a span lies in the same aroundSize bytes of the file as an address
// in it: in one block, which is checked as a whole in any case.
func around(c span, addr uint64) span {
	before := (uint64(c.off) + addr - c.addr) % aroundSize
	return c.part(addr-min(before, addr-c.addr), addr-before+aroundSize)
}

// zero answers a fault in a page that has no content.
func (s *space) zero(addr uint64) error {
	end := next(s.spans, addr, addr+aroundSize)
	for _, size := range []uint64{end - addr, pageSize} {
		filled, errno := uffdZero(s.fd, addr, size)
		s.p.zeroed.Add(filled)
		switch {
		case filled > 0:
			return nil
		case errno == unix.EAGAIN:
			s.deferred = append(s.deferred, addr)
			return nil
		case errno == unix.ESRCH || errno == unix.ENOSPC:
			return errExited
		case errno == unix.ENOENT && size > pageSize:
			// Beyond the end of the mapping.
		case errno == unix.ENOENT || errno == unix.EEXIST:
			uffdWake(s.fd, addr, pageSize)
			return nil
		default:
			return fmt.Errorf("process %d: zero page at %#x: %w", s.pid, addr, errno)
		}
	}
	return nil
}
