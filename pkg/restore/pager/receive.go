package pager

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

// restoreFinished is CRIU's last message.
const restoreFinished = 0x52535446

var errProtocol = fmt.Errorf("not CRIU's protocol: %w", checkpoint.ErrInvalid)

// listen makes the socket. CRIU names it relative to its work directory, whose
// path may be longer than the path of a socket, so it is named by a descriptor
// of the directory here. The socket's name is gone when CRIU has connected.
func listen(dir string) (_ *net.UnixListener, remove func() error, err error) {
	const name = "lazy-pages.socket"
	d, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("work directory: %w", err)
	}
	remove = func() error {
		err := unix.Unlinkat(int(d.Fd()), name, 0)
		if errors.Is(err, unix.ENOENT) {
			err = nil
		}
		return errors.Join(err, d.Close())
	}
	path := filepath.Join(fmt.Sprintf("/proc/self/fd/%d", d.Fd()), name)
	if err := unix.Unlinkat(int(d.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) { // of an earlier try
		d.Close()
		return nil, nil, fmt.Errorf("remove %s: %w", name, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		d.Close()
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, nil, errors.Join(err, l.Close(), remove())
	}
	return l, remove, nil
}

// receive talks to CRIU until it has finished its restore.
func (p *Pager) receive(l *net.UnixListener, remove func() error) {
	deadline := p.start.Add(p.opt.RestoreTimeout)
	conn, err := p.accept(l, deadline)
	err = errors.Join(err, remove())
	if conn == nil {
		p.abandon(fmt.Errorf("wait for CRIU: %w", err))
		return
	}
	defer conn.Close()
	conn.SetDeadline(deadline)
	defer p.atEnd(func() { conn.SetDeadline(time.Unix(1, 0)) })()
	finished := false
	if err == nil {
		err = p.receiveAll(conn)
		finished = err == nil
	}
	if err == nil {
		// All descriptors are held.
		err = control(conn, p.opt.Keeper.release)
	}
	if err == nil {
		p.setReady()
		return
	}
	p.end(err)
	if !finished {
		// What CRIU has not yet sent it cannot send any more. If the last message is
		// not among what it has sent, it will fail to send it, and kill the tasks.
		var derr error
		if finished, derr = p.drain(conn); !finished && derr == nil { // after an error, who knows?
			p.abandon(err)
			return
		}
	}
	p.setReady() // the tasks may run, and are to wait for what is missing
}

// accept waits for CRIU to connect, and closes the listener. The keeper has the
// one or the other all the time.
func (p *Pager) accept(l *net.UnixListener, deadline time.Time) (conn *net.UnixConn, err error) {
	l.SetDeadline(deadline)
	defer p.atEnd(func() { l.SetDeadline(time.Unix(1, 0)) })()
	if conn, err = l.AcceptUnix(); err == nil {
		err = control(conn, p.opt.Keeper.holdSocket)
	}
	return conn, errors.Join(err, control(l, p.opt.Keeper.release), l.Close())
}

// control calls f with the descriptor of a socket.
func control(c syscall.Conn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(cerr, err)
}

// receiveAll receives a descriptor, or a zombie's sign, for each process and
// then the last message.
func (p *Pager) receiveAll(conn *net.UnixConn) error {
	if err := checkPeer(conn); err != nil {
		return err
	}
	left := make(map[uint32]criu.LazyTask, len(p.mem.Tasks))
	for _, t := range p.mem.Tasks {
		left[t.PID] = t
	}
	for {
		b, fds, err := p.read(conn, 4)
		if err != nil {
			return err
		}
		if len(fds) > 0 {
			return fmt.Errorf("descriptor without a process: %w", errProtocol)
		}
		id := int32(binary.NativeEndian.Uint32(b))
		if id == restoreFinished {
			if len(left) > 0 {
				return fmt.Errorf("finished, though %d processes have not come: %w", len(left), errProtocol)
			}
			return nil
		}
		t, ok := left[uint32(max(id, -id))]
		if !ok || t.Zombie != (id < 0) {
			return fmt.Errorf("process %d is not in the images, or came twice: %w", id, errProtocol)
		}
		delete(left, t.PID)
		if t.Zombie {
			continue
		}
		fd, err := p.readDescriptor(conn)
		if err != nil {
			return fmt.Errorf("process %d: %w", id, err)
		}
		s := &space{p: p, pid: t.PID, fd: fd, src: p.contents[t.PID], epoch: 1}
		for _, r := range t.Runs {
			s.spans = append(s.spans, span{addr: r.Addr, size: r.Size, off: r.Off, notInherited: r.NotInherited})
		}
		var hot int
		s.todo, hot = hotFirst(s.spans, t.PID, p.opt.Hot)
		p.mu.Lock()
		p.hotRanges += hot
		p.mu.Unlock()
		p.unhold(fd)
		if err := p.add(s); err != nil {
			return err
		}
	}
}

// read reads exactly n bytes, at most 4, and the descriptors that come along,
// which are held.
func (p *Pager) read(conn *net.UnixConn, n int) ([]byte, []int, error) {
	b, oob := make([]byte, n), make([]byte, unix.CmsgSpace(4*4))
	got, oobn, flags, _, err := conn.ReadMsgUnix(b, oob)
	fds := p.hold(oob[:oobn])
	switch {
	case errors.Is(err, io.EOF):
		return nil, fds, fmt.Errorf("CRIU has failed: %w", io.ErrUnexpectedEOF)
	case err != nil:
		return nil, fds, fmt.Errorf("read from CRIU: %w", err)
	case got != n || flags&unix.MSG_CTRUNC != 0:
		return nil, fds, fmt.Errorf("%d bytes instead of %d: %w", got, n, errProtocol)
	}
	return b, fds, nil
}

// readDescriptor reads a byte, of no meaning, and the descriptor that comes
// along. That stays in the queue of the socket, which the keeper has as well,
// until the keeper has it: a copy is passed on before the message is taken.
func (p *Pager) readDescriptor(conn *net.UnixConn) (int, error) {
	copies, err := p.peek(conn)
	if err != nil {
		return -1, fmt.Errorf("read from CRIU: %w", err)
	}
	for _, fd := range copies {
		if err := p.opt.Keeper.hold(fd); err != nil {
			return -1, fmt.Errorf("keep descriptor: %w", err)
		}
	}
	_, fds, err := p.read(conn, 1)
	if err != nil {
		return -1, err
	}
	if len(fds) != 1 || len(copies) != 1 {
		return -1, fmt.Errorf("%d descriptors: %w", len(fds), errProtocol)
	}
	p.unhold(fds[0])
	return copies[0], unix.Close(fds[0])
}

// peek copies the descriptors of the next byte, which are held.
func (p *Pager) peek(conn *net.UnixConn) (fds []int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4*4))
	var oobn int
	rerr := raw.Read(func(fd uintptr) bool {
		_, oobn, _, _, err = unix.Recvmsg(int(fd), b[:], oob, unix.MSG_PEEK|unix.MSG_CMSG_CLOEXEC)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
	if err := errors.Join(rerr, err); err != nil {
		return nil, err
	}
	return p.hold(oob[:oobn]), nil
}

// hold keeps the descriptors of a control message.
func (p *Pager) hold(oob []byte) (fds []int) {
	fds = rights(oob)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = append(p.held, fds...)
	return fds
}

// drain ends the connection and tells whether the last message is in what had
// come. Descriptors in it are kept, as there may be tasks that run.
func (p *Pager) drain(conn *net.UnixConn) (finished bool, err error) {
	if err := conn.CloseRead(); err != nil {
		return false, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return false, err
	}
	var last uint32
	cerr := raw.Control(func(fd uintptr) { // without the deadlines, as nothing is to be waited for
		for {
			var b [1]byte
			oob := make([]byte, unix.CmsgSpace(4*4))
			var n, oobn int
			n, oobn, _, _, err = unix.Recvmsg(int(fd), b[:], oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil || n == 0 {
				return
			}
			for _, fd := range p.hold(oob[:oobn]) {
				p.opt.Keeper.hold(fd) // an error is nothing new here
			}
			// In the machine's order, which is little-endian wherever this runs.
			last = last>>8 | uint32(b[0])<<24
		}
	})
	return last == restoreFinished, errors.Join(err, cerr)
}

// checkPeer accepts only processes of the pager's own user.
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("peer of the socket: %w", err)
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d connected: %w", cred.Uid, errProtocol)
	}
	return nil
}
