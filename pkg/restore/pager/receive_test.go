package pager

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// sampleImages has processes 1 and 7, and the zombie 8; its pages are zeroes.
func sampleImages(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../../checkpoint/criu/testdata/criu42")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pages-2.img", "pages-3.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func newUffd(t testing.TB) int {
	t.Helper()
	const userModeOnly = 1
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|userModeOnly, 0, 0)
	if errno != 0 {
		t.Fatalf("userfaultfd: %v", errno)
	}
	api := [3]uint64{0xaa}
	if errno := ioctl(int(fd), 0xc018aa3f, unsafe.Pointer(&api)); errno != 0 {
		t.Fatalf("UFFDIO_API: %v", errno)
	}
	return int(fd)
}

// uffds counts the userfaultfds of this process.
func uffds(t *testing.T) (n int) {
	t.Helper()
	names, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if to, err := os.Readlink(name); err == nil && to == "anon_inode:[userfaultfd]" {
			n++
		}
	}
	return n
}

// step is something that CRIU, or somebody else, sends.
type step struct {
	number int32
	bytes  string // instead of the number
	fds    int    // userfaultfds that come along
	file   bool   // another descriptor comes along
}

func (s step) send(t *testing.T, c *net.UnixConn) error {
	t.Helper()
	b := []byte(s.bytes)
	if len(b) == 0 {
		b = binary.NativeEndian.AppendUint32(nil, uint32(s.number))
	}
	var fds []int
	for range s.fds {
		fds = append(fds, newUffd(t))
	}
	if s.file {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := c.WriteMsgUnix(b, oob, nil)
	for _, fd := range fds {
		unix.Close(fd)
	}
	return err
}

// TestProtocol speaks with the pager as CRIU does, and as it does not.
func TestProtocol(t *testing.T) {
	images := sampleImages(t)
	one, seven, fd := step{number: 1}, step{number: 7}, step{bytes: "\x00", fds: 1}
	zombie, finished := step{number: -8}, step{number: restoreFinished}
	for _, tt := range []struct {
		name     string
		steps    []step
		want     error
		restored bool // the tasks may run, so descriptors must stay
		held     int
	}{
		{"nothing", nil, io.ErrUnexpectedEOF, false, 0},
		{"ends in the middle", []step{one, fd, seven}, io.ErrUnexpectedEOF, false, 0},
		{"finished at once", []step{finished}, errProtocol, false, 0},
		{"finished too early", []step{one, fd, zombie, finished}, errProtocol, false, 0},
		{"unknown process", []step{{number: 2}, fd}, errProtocol, false, 0},
		{"process 0", []step{{number: 0}, fd}, errProtocol, false, 0},
		{"least number", []step{{number: -1 << 31}, fd}, errProtocol, false, 0},
		{"process twice", []step{one, fd, one, fd}, errProtocol, false, 0},
		{"zombie that lives", []step{{number: -1}}, errProtocol, false, 0},
		{"living zombie", []step{{number: 8}, fd}, errProtocol, false, 0},
		{"no descriptor", []step{one, {bytes: "\x00"}}, errProtocol, false, 0},
		{"two descriptors", []step{one, {bytes: "\x00", fds: 2}}, errProtocol, false, 0},
		{"descriptor of something else", []step{one, {bytes: "\x00", file: true}}, nil, false, 0},
		{"descriptor with the process", []step{{number: 1, fds: 1}}, errProtocol, false, 0},
		{"short number", []step{{bytes: "\x01\x00"}}, errProtocol, false, 0},
		// What CRIU has sent stands: it takes the restore for a success.
		{"finished behind an error", []step{one, fd, {number: 2}, fd, seven, fd, finished}, errProtocol, true, 3},
		// Memory that is in the images and not registered.
		{"no memory", []step{zombie, seven, fd, one, fd, finished}, nil, true, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			work := filepath.Join(t.TempDir(), strings.Repeat("a long path ", 16))
			if err := os.Mkdir(work, 0o700); err != nil {
				t.Fatal(err)
			}
			p, err := Start(t.Context(), Options{ImageDir: images, WorkDir: work, RestoreTimeout: 10 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if fi, err := os.Stat(filepath.Join(work, "lazy-pages.socket")); err != nil || fi.Mode().Perm() != 0o600 {
				t.Fatalf("socket: %v, %v", fi.Mode(), err)
			}
			c := dial(t, work)
			// All is in the queue before the pager reads on: it holds this lock.
			p.mu.Lock()
			for _, s := range tt.steps {
				if err := s.send(t, c); err != nil && !errors.Is(err, unix.EPIPE) {
					t.Fatal(err)
				}
			}
			if !tt.restored {
				defer c.Close()
				if errors.Is(tt.want, io.ErrUnexpectedEOF) {
					c.Close()
				}
			}
			p.mu.Unlock()
			err = p.Wait(t.Context())
			if err == nil || errors.Is(err, ErrNotRestored) == tt.restored || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("wait: %v", err)
			}
			if got := uffds(t); got != tt.held {
				t.Errorf("%d descriptors are held", got)
			}
			if p.isRestored() != tt.restored {
				t.Errorf("tasks may have run: %v", p.isRestored())
			}
			if !tt.restored && tt.want != io.ErrUnexpectedEOF {
				if err := finished.send(t, c); !errors.Is(err, unix.EPIPE) {
					t.Errorf("CRIU can still finish: %v", err)
				}
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if got := uffds(t); got != 0 {
				t.Errorf("%d descriptors are left", got)
			}
			if left, _ := os.ReadDir(work); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestKeeperGone: where nobody can hold the descriptors any more when CRIU's last message
// comes, the tasks wait for what is missing, and do not read zeroes.
func TestKeeperGone(t *testing.T) {
	ours, theirs := socketPair(t)
	defer ours.Close()
	work := t.TempDir()
	p, err := Start(t.Context(), Options{ImageDir: sampleImages(t), WorkDir: work, RestoreTimeout: 10 * time.Second, Keeper: NewKeeper(ours)})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c := dial(t, work)
	defer c.Close()
	fd := step{bytes: "\x00", fds: 1}
	for _, s := range []step{{number: -8}, {number: 7}, fd, {number: 1}, fd} {
		if err := s.send(t, c); err != nil {
			t.Fatal(err)
		}
	}
	watched := func() (n int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, s := range p.spaces {
			if s.watched {
				n++
			}
		}
		return n
	}
	for end := time.Now().Add(10 * time.Second); watched() < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the processes are not taken in")
		}
	}
	// As with a process that is killed: what it holds is closed, and nothing is said.
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	if err := (step{number: restoreFinished}).send(t, c); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(t.Context()); err == nil || errors.Is(err, ErrNotRestored) {
		t.Errorf("wait: %v", err)
	}
	if got := uffds(t); got != 2 {
		t.Errorf("%d descriptors are held", got)
	}
	if !p.isRestored() {
		t.Error("tasks may have run, and it does not say so")
	}
}

// dial connects as CRIU does, by a relative name.
func dial(t *testing.T, work string) *net.UnixConn {
	t.Helper()
	t.Chdir(work)
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: "lazy-pages.socket", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestNobodyComes ends a pager that CRIU never talks to, or not to the end.
func TestNobodyComes(t *testing.T) {
	images := sampleImages(t)
	for _, connect := range []bool{false, true} {
		for _, how := range []string{"timeout", "cancel", "close"} {
			work := t.TempDir()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			opt := Options{ImageDir: images, WorkDir: work}
			if how == "timeout" {
				opt.RestoreTimeout = 50 * time.Millisecond
			}
			p, err := Start(ctx, opt)
			if err != nil {
				t.Fatal(err)
			}
			if connect {
				defer dial(t, work).Close()
			}
			switch how {
			case "cancel":
				cancel()
			case "close":
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			}
			if err := p.Wait(t.Context()); !errors.Is(err, ErrNotRestored) {
				t.Errorf("%s: %v", how, err)
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if left, _ := os.ReadDir(work); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		}
	}
}

func TestStartRefuses(t *testing.T) {
	images := sampleImages(t)
	if _, err := Start(t.Context(), Options{ImageDir: images, WorkDir: "nowhere"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no work directory: %v", err)
	}
	if err := os.Truncate(filepath.Join(images, "pages-2.img"), 0); err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	if _, err := Start(t.Context(), Options{ImageDir: images, WorkDir: work}); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("no pages: %v", err)
	}
	if left, _ := os.ReadDir(work); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestHoldSocket loses the keeper of sockets: whoever sends to them is told so,
// whether somebody has accepted the connection or not, and what was sent before
// is still there.
func TestHoldSocket(t *testing.T) {
	for _, accepted := range []bool{false, true} {
		dir := t.TempDir()
		l, remove, err := listen(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer remove()
		ours, theirs := socketPair(t)
		h := Hold(theirs)
		k := NewKeeper(ours)
		if err := control(l, k.holdSocket); err != nil {
			t.Fatal(err)
		}
		c := dial(t, dir)
		defer c.Close()
		if err := (step{number: 1}).send(t, c); err != nil {
			t.Fatal(err)
		}
		if accepted {
			conn, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(control(conn, k.holdSocket), control(l, k.release), conn.Close()); err != nil {
				t.Fatal(err)
			}
		}
		l.Close()
		ours.Close()
		if err := h.Wait(t.Context()); !errors.Is(err, ErrLost) {
			t.Errorf("wait: %v", err)
		}
		if err := (step{number: restoreFinished}).send(t, c); !errors.Is(err, unix.EPIPE) {
			t.Errorf("CRIU can still finish: %v", err)
		}
		if c, err := net.Dial("unix", "lazy-pages.socket"); err == nil {
			c.Close()
			t.Error("CRIU can still connect")
		}
		queued := false
		for _, held := range h.fds {
			n, _, _, _, err := unix.Recvmsg(held.fd, make([]byte, 4), nil, unix.MSG_DONTWAIT)
			queued = queued || err == nil && n == 4
		}
		if !queued {
			t.Error("what was sent is lost")
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestHold loses, releases and confuses the holder of descriptors.
func TestHold(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(k *Keeper, fd int) error
		lost bool
		held int
	}{
		{"nothing", func(*Keeper, int) error { return nil }, false, 0},
		{"lost", func(k *Keeper, fd int) error { return k.hold(fd) }, true, 1},
		{"full", func(k *Keeper, fd int) error { return errors.Join(k.hold(fd), k.release(fd)) }, false, 0},
		{"number again", func(k *Keeper, fd int) error {
			return errors.Join(k.hold(fd), k.release(fd), k.hold(fd), k.release(fd))
		}, false, 0},
		{"released without being held", func(k *Keeper, fd int) error { return k.release(fd) }, true, 0},
		{"garbage with a descriptor", func(k *Keeper, fd int) error {
			_, _, err := k.conn.WriteMsgUnix([]byte("xxxxx"), unix.UnixRights(fd), nil)
			return err
		}, true, 1},
		{"half a message", func(k *Keeper, fd int) error {
			_, _, err := k.conn.WriteMsgUnix([]byte("h"), unix.UnixRights(fd), nil)
			return err
		}, true, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := socketPair(t)
			h := Hold(b)
			fd := newUffd(t)
			if err := tt.do(NewKeeper(a), fd); err != nil {
				t.Fatal(err)
			}
			a.Close()
			unix.Close(fd)
			if err := h.Wait(t.Context()); errors.Is(err, ErrLost) != tt.lost || err != nil && !tt.lost {
				t.Errorf("wait: %v", err)
			}
			if got := uffds(t); got != tt.held {
				t.Errorf("%d descriptors are held", got)
			}
			if err := errors.Join(h.Close(), h.Close()); err != nil {
				t.Error(err)
			}
			if got := uffds(t); got != 0 {
				t.Errorf("%d descriptors are left", got)
			}
		})
	}
}
