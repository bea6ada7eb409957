package pager

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	chunkSize     = 512 << 10 // of the bulk
	busyChunkSize = 128 << 10 // of the bulk, while there are faults: they wait for it
	busyTime      = 10 * time.Millisecond
	aroundSize    = 64 << 10 // filled at a fault, from its page on
	maxMessages   = 64       // read at once
)

var (
	// errChanging: the address space is being changed; an event tells how.
	errChanging = errors.New("address space is changing")
	// errExited: there is no address space any more.
	errExited = errors.New("process is gone")
)

// space is one address space that is being filled.
type space struct {
	p     *Pager
	pid   uint32 // in the images; of the ancestor, for a child of fork
	child bool   // made by fork
	fd    int    // userfaultfd; -1 once closed
	src   *os.File

	// rw orders copies, which hold it for reading, and the reading of events.
	rw sync.RWMutex
	// spans is where missing pages have their content, by address. It changes
	// with events only, not with the filling. Owned by the server.
	spans []span
	// doubt is what was unmapped after it had been moved: if it is still there,
	// the two events came in the wrong order. Owned by the server.
	doubt []span
	// deferred are addresses of faults to be looked at again. Owned by the server.
	deferred []uint64

	mu   sync.Mutex
	todo []span // what the bulk has not yet looked at, in its order
	gone bool   // the process
}

// take takes a piece of what is to be done.
func (s *space) take(size uint64) (span, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.todo) == 0 {
		return span{}, false
	}
	first := &s.todo[0]
	c := first.part(first.addr, first.addr+size)
	if c.size == first.size {
		s.todo = s.todo[1:]
	} else {
		*first = first.part(c.end(), first.end())
	}
	return c, true
}

// giveBack returns what was taken and not done.
func (s *space) giveBack(c span) {
	if c.size == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.todo = append(s.todo, c)
}

func (s *space) setGone() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone, s.todo = true, nil
}

// idle tells whether nothing is to be done, gone whether for want of a process.
func (s *space) idle() (idle, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.todo) == 0, s.gone
}

// bulk fills one piece, if there is one. The buffer is for the content, of
// chunkSize bytes.
func (s *space) bulk(buf []byte) error {
	size := uint64(chunkSize)
	if time.Since(time.Unix(0, s.p.lastFault.Load())) < busyTime {
		size = busyChunkSize
	}
	s.rw.RLock()
	defer s.rw.RUnlock()
	c, ok := s.take(size)
	if !ok {
		return nil
	}
	done, _, err := s.fill(c, buf)
	if err != nil {
		s.giveBack(c.part(c.addr+done, c.end()))
	}
	return err
}

// fill gives a span its content, by way of the buffer, except where there are
// pages already. It returns how much of it, from its beginning, needs no more,
// and how many bytes were copied. The caller holds rw, or is the server.
//
// Reading into a buffer that stays in the processor's cache is faster than
// mapping the images, which costs page tables and a fault for every few pages.
func (s *space) fill(c span, buf []byte) (done, copied uint64, err error) {
	buf = buf[:c.size]
	if _, err := s.src.ReadAt(buf, c.off); err != nil {
		return 0, 0, fmt.Errorf("process %d: content of %#x: %w", s.pid, c.addr, err)
	}
	for try := c.size; done < c.size; {
		n := min(try, c.size-done)
		filled, errno := uffdCopy(s.fd, c.addr+done, buf[done:done+n])
		done += filled
		copied += filled
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
			case s.child:
				done += pageSize // MADV_DONTFORK
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
		n, rerr := unix.Read(s.fd, b[:])
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
	switch m.event {
	case eventFork:
		child = &space{
			p: s.p, pid: s.pid, child: true, fd: int(int32(m.arg[0])), src: s.src,
			doubt: slices.Clone(s.doubt), gone: s.gone,
		}
		keeps := func(c span) bool { return c.notInherited }
		child.spans = slices.DeleteFunc(slices.Clone(s.spans), keeps)
		child.todo = slices.DeleteFunc(slices.Clone(s.todo), keeps)
	case eventRemap:
		from, to, size := m.arg[0], m.arg[1], m.arg[2]
		if from+size < from || to+size < to {
			return nil, fmt.Errorf("process %d: remap of %#x bytes from %#x to %#x", s.pid, size, from, to)
		}
		s.doubt, _ = cut(s.doubt, to, to+size)
		s.todo = move(s.todo, from, to, size)
		s.spans = move(s.spans, from, to, size)
		sortSpans(s.spans)
	case eventRemove, eventUnmap:
		start, end := m.arg[0], m.arg[1]
		s.todo, _ = cut(s.todo, start, end)
		var lost []span
		s.spans, lost = cut(s.spans, start, end)
		if m.event == eventUnmap {
			s.doubt = append(s.doubt, slices.DeleteFunc(lost, func(c span) bool { return !c.moved })...)
		}
	default:
		return nil, fmt.Errorf("process %d: unknown event %#x", s.pid, m.event)
	}
	return child, nil
}

// fault answers those who wait for a page.
func (s *space) fault(addr uint64) error {
	s.p.lastFault.Store(time.Now().UnixNano())
	s.p.faults.Add(1)
	if slices.ContainsFunc(s.doubt, func(c span) bool { return c.addr <= addr && addr < c.end() }) {
		return s.doubtful(addr)
	}
	c, ok := find(s.spans, addr)
	if !ok {
		return s.zero(addr)
	}
	c = c.part(addr, addr+aroundSize)
	done, copied, err := s.fill(c, s.p.faultBuf[:])
	if done > 0 && errors.Is(err, errChanging) {
		err = nil // at least the page that is waited for is there
	}
	switch {
	case errors.Is(err, errChanging):
		s.deferred = append(s.deferred, addr)
		return nil
	case err == nil && copied < pageSize:
		uffdWake(s.fd, addr, pageSize) // it was there already
	}
	return err
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

func (s *space) doubtful(addr uint64) error {
	return fmt.Errorf("process %d: memory at %#x was unmapped and moved at once, and the order is not known", s.pid, addr)
}

// settle finds out whether memory in doubt is still there, before the
// descriptor is closed. The caller holds rw.
func (s *space) settle() error {
	for _, c := range s.doubt {
		for addr := c.addr; addr < c.end(); addr += pageSize {
			if _, errno := uffdZero(s.fd, addr, pageSize); errno == 0 || errno == unix.EEXIST || errno == unix.EAGAIN {
				return s.doubtful(addr)
			}
		}
	}
	return nil
}
