package pager

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What a keeper says: an operation and the number of a descriptor, which comes
// along when it is to be held.
const (
	keepHold    = 'h'
	keepSocket  = 's' // the same for a socket that CRIU sends descriptors to
	keepRelease = 'r'
	keepSize    = 5
	// maxHeld bounds the descriptors held, one for each process.
	maxHeld = 1 << 16
)

// keepTimeout bounds a message to the other process, which only has to take it.
const keepTimeout = 5 * time.Second

// Keeper gives another process a copy of each userfaultfd. When the pager's
// process dies, its copies are closed; those of the other process keep whoever
// touches a missing page waiting until the other process has killed them. See
// [Hold] for the other end.
//
// No descriptor is ever in the pager's process alone: what CRIU has sent stays
// in the queue of a socket that the other process has as well, until that has
// the descriptor. The one exception is that of a child of fork, which the kernel
// puts into the process that reads the event; it is passed on at once.
type Keeper struct {
	conn *net.UnixConn

	mu   sync.Mutex
	last uint32
	ids  map[int]uint32 // by descriptor
}

// NewKeeper makes a keeper of one end of a connection (a stream). The caller
// closes it after the pager, not before: the other end takes its end for that
// of the pager.
func NewKeeper(conn *net.UnixConn) *Keeper {
	return &Keeper{conn: conn, ids: map[int]uint32{}}
}

// send writes one message. The caller holds mu.
func (k *Keeper) send(op byte, id uint32, oob []byte) error {
	k.conn.SetWriteDeadline(time.Now().Add(keepTimeout))
	_, _, err := k.conn.WriteMsgUnix(binary.LittleEndian.AppendUint32([]byte{op}, id), oob, nil)
	return err
}

// hold has a userfaultfd held, if it is not yet. It is safe from the time it was
// sent. Like the other methods it does nothing on a nil Keeper.
func (k *Keeper) hold(fd int) error { return k.give(keepHold, fd) }

// holdSocket has a socket held, one that listens or is connected. If the pager
// is lost it is shut down, so that CRIU cannot go on.
func (k *Keeper) holdSocket(fd int) error { return k.give(keepSocket, fd) }

func (k *Keeper) give(op byte, fd int) error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, held := k.ids[fd]; held {
		return nil
	}
	k.last++
	k.ids[fd] = k.last
	return k.send(op, k.last, unix.UnixRights(fd))
}

// release ends that: whoever waits for the memory goes on.
func (k *Keeper) release(fd int) error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	id := k.ids[fd]
	delete(k.ids, fd)
	return k.send(keepRelease, id, nil)
}

// releaseAll releases what is held.
func (k *Keeper) releaseAll() error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for _, id := range k.ids {
		errs = append(errs, k.send(keepRelease, id, nil))
	}
	clear(k.ids)
	return errors.Join(errs...)
}

// ErrLost is the error of [Held.Wait] where the pager has ended before all
// memory was full.
var ErrLost = errors.New("pager has ended before memory was full")

// Held are descriptors held for a pager in another process.
type Held struct {
	conn *net.UnixConn
	done chan struct{}
	once sync.Once

	mu  sync.Mutex
	fds map[uint32]heldFD
	// unnumbered is the last number of those that the keeper gave none; they
	// count down from the highest.
	unnumbered uint32
	err        error
}

type heldFD struct {
	fd     int
	socket bool
}

// Hold holds what the [Keeper] at the other end of the connection gives. It
// must be closed.
func Hold(conn *net.UnixConn) *Held {
	h := &Held{conn: conn, done: make(chan struct{}), fds: map[uint32]heldFD{}}
	go func() {
		defer close(h.done)
		err := h.receive()
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.err = err; err == nil && len(h.fds) > 0 {
			h.err = ErrLost
		} else if err != nil {
			h.err = fmt.Errorf("%w: %w", ErrLost, err)
		}
		h.shutSockets()
	}()
	return h
}

// shutSockets makes CRIU fail, unless it has sent its last message: then all
// tasks are there to be killed. What is in the sockets' queues stays there. The
// caller holds mu.
func (h *Held) shutSockets() {
	var accepted []int
	for _, s := range h.fds {
		if !s.socket {
			continue
		}
		unix.Shutdown(s.fd, unix.SHUT_RDWR)
		for { // those that nobody has accepted; a connected socket has none
			fd, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if err != nil {
				break
			}
			unix.Shutdown(fd, unix.SHUT_RDWR)
			accepted = append(accepted, fd)
		}
	}
	h.keepUnnumbered(accepted)
}

// keepUnnumbered holds what has no number of the keeper's. The caller holds mu.
func (h *Held) keepUnnumbered(fds []int) {
	for _, fd := range fds {
		h.unnumbered--
		h.fds[h.unnumbered] = heldFD{fd: fd}
	}
}

// receive follows the keeper until it closes the connection.
func (h *Held) receive() error {
	for {
		var b [keepSize]byte
		oob := make([]byte, unix.CmsgSpace(4))
		n, oobn, flags, _, err := h.conn.ReadMsgUnix(b[:], oob)
		fds := rights(oob[:oobn])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil && n < len(b) {
			_, err = io.ReadFull(h.conn, b[n:])
		}
		id := binary.LittleEndian.Uint32(b[1:])
		h.mu.Lock()
		old, known := h.fds[id]
		switch {
		case err != nil:
		case (b[0] == keepHold || b[0] == keepSocket) && len(fds) == 1 && !known && len(h.fds) < maxHeld && flags&unix.MSG_CTRUNC == 0:
			h.fds[id], fds = heldFD{fds[0], b[0] == keepSocket}, nil
		case b[0] == keepRelease && len(fds) == 0 && known:
			delete(h.fds, id)
			err = unix.Close(old.fd)
		default:
			err = errProtocol
		}
		h.mu.Unlock()
		if err != nil {
			// Held as well, under no number: it may be of a task that runs.
			h.mu.Lock()
			h.keepUnnumbered(fds)
			h.mu.Unlock()
			return err
		}
	}
}

// Wait waits for the end of the pager: nil when all memory is full, [ErrLost]
// when the tasks must be killed, before [Held.Close].
func (h *Held) Wait(ctx context.Context) error {
	select {
	case <-h.done:
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close closes the connection and what is held: pages that are missing, and
// that no pager holds either, read as zero from then on.
func (h *Held) Close() error {
	err := error(nil)
	h.once.Do(func() {
		h.conn.SetDeadline(time.Unix(1, 0))
		<-h.done
		err = h.conn.Close()
		for _, held := range h.fds {
			err = errors.Join(err, unix.Close(held.fd))
		}
	})
	return err
}

// rights are the descriptors of a control message.
func rights(oob []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds
}
