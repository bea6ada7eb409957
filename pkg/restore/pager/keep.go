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

// hold has a descriptor held. It is safe from the time it was sent.
func (k *Keeper) hold(fd int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.last++
	k.ids[fd] = k.last
	return k.send(keepHold, k.last, unix.UnixRights(fd))
}

// release ends that: whoever waits for the memory goes on.
func (k *Keeper) release(fd int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	id := k.ids[fd]
	delete(k.ids, fd)
	return k.send(keepRelease, id, nil)
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
	fds map[uint32]int
	err error
}

// Hold holds what the [Keeper] at the other end of the connection gives. It
// must be closed.
func Hold(conn *net.UnixConn) *Held {
	h := &Held{conn: conn, done: make(chan struct{}), fds: map[uint32]int{}}
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
	}()
	return h
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
		case b[0] == keepHold && len(fds) == 1 && !known && len(h.fds) < maxHeld && flags&unix.MSG_CTRUNC == 0:
			h.fds[id], fds = fds[0], nil
		case b[0] == keepRelease && len(fds) == 0 && known:
			delete(h.fds, id)
			err = unix.Close(old)
		default:
			err = errProtocol
		}
		h.mu.Unlock()
		if err != nil {
			// Held as well, under no number: it may be of a task that runs.
			h.mu.Lock()
			for i, fd := range fds {
				h.fds[^uint32(i)] = fd
			}
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
		for _, fd := range h.fds {
			err = errors.Join(err, unix.Close(fd))
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
