package pager

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

const pageSize = criu.PageSize

// Requests of userfaultfd, include/uapi/linux/userfaultfd.h, on architectures
// with the generic encoding.
const (
	uffdioWake     = 0x8010aa02
	uffdioCopy     = 0xc028aa03
	uffdioZeropage = 0xc020aa04
)

// Events, likewise.
const (
	eventPagefault = 0x12
	eventFork      = 0x13
	eventRemap     = 0x14
	eventRemove    = 0x15
	eventUnmap     = 0x16

	messageSize = 32
)

// message is a struct uffd_msg. Its arguments are, by event: flags and address;
// descriptor; from, to and length; start and end, twice.
type message struct {
	event byte
	arg   [3]uint64
}

func parseMessage(b []byte) message {
	m := message{event: b[0]}
	for i := range m.arg {
		m.arg[i] = binary.NativeEndian.Uint64(b[8+8*i:])
	}
	return m
}

// untold are the calls of which the runtime is not told just now, and maxUntold is how
// many there may be.
var (
	untold    atomic.Int32
	maxUntold = sync.OnceValue(func() int32 { return int32(max(runtime.GOMAXPROCS(0)-2, 1)) })
)

// ioctl does not tell the runtime of the call, of callSize at most, as it takes some
// microseconds: the runtime would hand the thread's turn to another thread again and
// again, and two threads fill a third more memory in the same time without that.
//
// Where the task changes its address space meanwhile, or is at its limit of memory, a
// call may take longer. Some turns are left to all else that the process does then.
func ioctl(fd int, request uintptr, arg unsafe.Pointer) (errno unix.Errno) {
	defer untold.Add(-1)
	if untold.Add(1) <= maxUntold() {
		_, _, errno = unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	} else {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	}
	return errno
}

// uffdRead reads messages. The descriptor does not block.
func uffdRead(fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// uffdCopy fills missing pages at dst. It returns the number of bytes filled,
// and why there were no more: EAGAIN with bytes means that the next call tells.
func uffdCopy(fd int, dst uint64, src []byte) (uint64, unix.Errno) {
	arg := struct {
		dst, src, len, mode uint64
		copy                int64
	}{dst: dst, src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(src)))), len: uint64(len(src))}
	errno := ioctl(fd, uffdioCopy, unsafe.Pointer(&arg))
	runtime.KeepAlive(src)
	return uint64(max(arg.copy, 0)), errno
}

// uffdZero makes missing pages at dst zero, with results as of uffdCopy.
func uffdZero(fd int, dst, size uint64) (uint64, unix.Errno) {
	arg := struct {
		dst, len, mode uint64
		zeropage       int64
	}{dst: dst, len: size}
	errno := ioctl(fd, uffdioZeropage, unsafe.Pointer(&arg))
	return uint64(max(arg.zeropage, 0)), errno
}

// uffdWake lets those who wait for pages look again.
func uffdWake(fd int, start, size uint64) unix.Errno {
	arg := [2]uint64{start, size}
	return ioctl(fd, uffdioWake, unsafe.Pointer(&arg))
}

// isUffd tells whether a descriptor is a userfaultfd.
func isUffd(fd int) bool {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	return err == nil && name == "anon_inode:[userfaultfd]"
}
