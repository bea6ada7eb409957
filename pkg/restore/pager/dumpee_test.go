package pager

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dumpee is set, in the environment of a process that is dumped, to the bytes
// of its memory, the number of processes, and the file for its address.
const dumpee = "STASIS_TEST_PAGER"

func TestMain(m *testing.M) {
	if v := os.Getenv(dumpee); v != "" {
		fmt.Fprintln(os.Stderr, beDumped(v))
		os.Exit(3)
	}
	if v := os.Getenv(separate); v != "" {
		if err := beSeparate(v); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// beDumped fills memory with a pattern, starts a child that does the same, and
// obeys whoever connects.
func beDumped(v string) error {
	size, rest, _ := strings.Cut(v, " ")
	count, file, _ := strings.Cut(rest, " ")
	bytes, err := strconv.Atoi(size)
	if err != nil {
		return err
	}
	if n, _ := strconv.Atoi(count); n > 1 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %s.child", dumpee, bytes, n-1, file))
		if err := cmd.Start(); err != nil {
			return err
		}
	}
	b, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	unix.Madvise(b[:len(b)/2], unix.MADV_HUGEPAGE) // where there are such pages
	m := &memory{b: b}
	if m.wiped, err = unix.Mmap(-1, 0, wipedSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return err
	}
	if err := unix.Madvise(m.wiped, unix.MADV_WIPEONFORK); err != nil {
		return err
	}
	for i := range m.wiped {
		m.wiped[i] = 1
	}
	for off := 0; off < len(b); off += pageSize {
		m.write(off, off)
	}
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false) // CRIU cannot dump such sockets
	l, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", []byte(l.Addr().String()), 0o600); err != nil {
		return err
	}
	if err := os.Rename(file+".new", file); err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			for in := bufio.NewScanner(c); in.Scan(); {
				answer := "ok"
				if err := m.obey(in.Text()); err != nil {
					answer = err.Error()
				}
				fmt.Fprintln(c, answer)
			}
		}()
	}
}

// memory is pages of which each holds its own number in all of its words.
type memory struct {
	b     []byte
	wiped []byte // a child of fork finds zeroes there, instead of ones
}

const wipedSize = 16 * pageSize

func (m *memory) write(off, page int) {
	for i := 0; i < pageSize; i += 8 {
		binary.NativeEndian.PutUint64(m.b[off+i:], uint64(page+i)*0x9e3779b97f4a7c15+1)
	}
}

// check compares [off, off+size) with the pattern of the pages that were at was.
func (m *memory) check(off, size, was int) error {
	return checkAt(unsafe.Pointer(&m.b[off]), size, was)
}

//go:noinline
func checkAt(at unsafe.Pointer, size, was int) error {
	for i := 0; i < size; i += 8 {
		if got := *(*uint64)(unsafe.Add(at, i)); got != uint64(was+i)*0x9e3779b97f4a7c15+1 {
			return fmt.Errorf("page at %#x: %#x in word %d", was+i&^(pageSize-1), got, i%pageSize/8)
		}
	}
	return nil
}

func (m *memory) zero(off, size int) error {
	for i := off; i < off+size; i += 8 {
		if w := binary.NativeEndian.Uint64(m.b[i:]); w != 0 {
			return fmt.Errorf("page at %#x: %#x instead of zero", i, w)
		}
	}
	return nil
}

const area = 1 << 20

// areas calls f with each mebibyte of memory, some at a time, in random order.
func (m *memory) areas(f func(off int) error) error {
	var wg sync.WaitGroup
	errs := make(chan error, len(m.b)/area)
	order := rand.Perm(len(m.b) / area)
	const workers = 8
	for w := range workers {
		wg.Go(func() {
			for i := w; i < len(order); i += workers {
				if err := f(order[i] * area); err != nil {
					errs <- err
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

func (m *memory) obey(command string) error {
	verify := func(off int) error { return m.check(off, area, off) }
	word, _, _ := strings.Cut(command, " ")
	switch word {
	case "touch": // one page
		return m.check(len(m.b)/2, pageSize, len(m.b)/2)
	case "some": // pages here and there, as a request needs them
		for range 32 {
			off := rand.IntN(len(m.b)/pageSize) * pageSize
			if err := m.check(off, pageSize, off); err != nil {
				return err
			}
		}
		return nil
	case "verify":
		return m.areas(verify)
	case "remove":
		// Half of each area; the rest must not change.
		return m.areas(func(off int) error {
			if err := unix.Madvise(m.b[off:off+area/2], unix.MADV_DONTNEED); err != nil {
				return err
			}
			if err := m.zero(off, area/4); err != nil { // the next quarter: later
				return err
			}
			return m.check(off+area/2, area/2, off+area/2)
		})
	case "removed":
		return m.areas(func(off int) error { return m.zero(off, area/2) })
	case "unmap":
		return m.areas(func(off int) error {
			at := unsafe.Pointer(&m.b[off])
			if err := unix.MunmapPtr(at, area/2); err != nil {
				return err
			}
			if _, err := unix.MmapPtr(-1, 0, at, area/2, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED); err != nil {
				return err
			}
			if err := m.zero(off, area/2); err != nil {
				return err
			}
			return m.check(off+area/2, area/2, off+area/2)
		})
	case "remap":
		// Each area twice: to a new place, and its two halves, exchanged, back.
		return m.areas(func(off int) error {
			at := unsafe.Pointer(&m.b[off])
			to, err := unix.MmapPtr(-1, 0, nil, 2*area, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err != nil {
				return err
			}
			if err := remap(at, area, to); err != nil {
				return err
			}
			if err := checkAt(unsafe.Add(to, area/4), area/4, off+area/4); err != nil {
				return err
			}
			if err := remap(to, area/2, unsafe.Add(at, area/2)); err != nil {
				return err
			}
			if err := remap(unsafe.Add(to, area/2), area/2, at); err != nil {
				return err
			}
			if err := m.check(off, area/2, off+area/2); err != nil {
				return err
			}
			return m.check(off+area/2, area/2, off)
		})
	case "drop":
		// Each area to a new place, where half of it is unmapped.
		return m.areas(func(off int) error {
			to, err := unix.MmapPtr(-1, 0, nil, area, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err != nil {
				return err
			}
			if err := remap(unsafe.Pointer(&m.b[off]), area, to); err != nil {
				return err
			}
			if err := unix.MunmapPtr(to, area/2); err != nil {
				return err
			}
			return checkAt(unsafe.Add(to, area/2), area/2, off+area/2)
		})
	case "protect":
		// Splits mappings, with no word to the pager.
		return m.areas(func(off int) error {
			if err := unix.Mprotect(m.b[off+area/4:off+area/2], unix.PROT_READ); err != nil {
				return err
			}
			return verify(off)
		})
	case "fork":
		for range 4 {
			if err := m.fork(); err != nil {
				return err
			}
		}
		return m.areas(verify)
	}
	return fmt.Errorf("what is %q?", command)
}

func remap(from unsafe.Pointer, size int, to unsafe.Pointer) error {
	if _, err := unix.MremapPtr(from, uintptr(size), to, uintptr(size), unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED); err != nil {
		return fmt.Errorf("mremap: %w", err)
	}
	return nil
}

// fork lets a child look at all pages, while the parent does, too. The child is
// a copy of this thread only, so it does nothing but look and exit.
func (m *memory) fork() error {
	runtime.LockOSThread()
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		code := uintptr(0)
		for i := 0; i < len(m.b); i += 8 {
			if *(*uint64)(unsafe.Add(unsafe.Pointer(unsafe.SliceData(m.b)), i)) != uint64(i)*0x9e3779b97f4a7c15+1 {
				code = 1
				break
			}
		}
		for i := range m.wiped {
			if m.wiped[i] != 0 {
				code = 2
				break
			}
		}
		unix.RawSyscall(unix.SYS_EXIT_GROUP, code, 0, 0)
	}
	runtime.UnlockOSThread()
	err := m.check(0, len(m.b)/4, 0)
	var ws unix.WaitStatus
	if _, werr := unix.Wait4(int(pid), &ws, 0, nil); werr != nil {
		return werr
	}
	if ws != 0 {
		return fmt.Errorf("child of fork: status %#x", ws)
	}
	for i, b := range m.wiped {
		if b != 1 {
			return fmt.Errorf("memory that is wiped on fork, %d: %d", i, b)
		}
	}
	return err
}

// ask sends a command to a dumped or restored process and returns its error.
func ask(t testing.TB, address, command string) error {
	t.Helper()
	c, err := connect(address)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.ask(command)
}

// client is a connection to a dumped or restored process.
type client struct {
	net.Conn
	answers *bufio.Reader
}

func connect(address string) (*client, error) {
	c, err := net.DialTimeout("tcp4", address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	return &client{c, bufio.NewReader(c)}, nil
}

func (c *client) ask(command string) error {
	if _, err := fmt.Fprintln(c, command); err != nil {
		return err
	}
	answer, err := c.answers.ReadString('\n')
	if err != nil {
		return err
	}
	if answer = strings.TrimSpace(answer); answer != "ok" {
		return fmt.Errorf("%s: %s", command, answer)
	}
	return nil
}
