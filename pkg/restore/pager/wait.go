package pager

import (
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// untoldTime is for how long a thread may sleep in the kernel without the runtime
// being told. It then keeps its turn, as while it computes, and goes on without
// asking for it again, which with what the runtime does about threads in the kernel
// takes as long as a fault. Who wants to stop all threads waits for it so long.
const untoldTime = 250 * time.Microsecond

// epollWait is epoll_wait for a time that need not be whole milliseconds, except where
// the kernel is older than 5.11, or a filter of system calls does not know the call.
func epollWait(epoll int, events []unix.EpollEvent, wait time.Duration) (n int, err error) {
	t := unix.NsecToTimespec(int64(wait))
	first, timeout := unsafe.Pointer(unsafe.SliceData(events)), unsafe.Pointer(&t)
	var got uintptr
	var errno unix.Errno
	// Two calls in full: a pointer must become a number in the call itself, not in one
	// of a variable, or what is on the stack may have moved by then.
	if wait <= untoldTime {
		got, _, errno = unix.RawSyscall6(unix.SYS_EPOLL_PWAIT2, uintptr(epoll), uintptr(first), uintptr(len(events)), uintptr(timeout), 0, 0)
	} else {
		got, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(epoll), uintptr(first), uintptr(len(events)), uintptr(timeout), 0, 0)
	}
	switch errno {
	case 0:
		return int(got), nil
	case unix.ENOSYS, unix.EPERM:
		return unix.EpollWait(epoll, events, int((wait+time.Millisecond-1)/time.Millisecond))
	}
	return 0, errno
}

// sleep sleeps as exactly as the kernel does it, other than [time.Sleep], whose unit
// is a millisecond here. It may end early.
func sleep(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	if d <= untoldTime {
		unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&t)), 0, 0)
		return
	}
	unix.Nanosleep(&t, nil)
}

// readCached reads what of the bytes at an offset is in the page cache, from their
// beginning on: nothing that has to be waited for, so the runtime is not told.
func readCached(f *os.File, b []byte, off int64) int {
	if len(b) == 0 {
		return 0
	}
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	n, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, f.Fd(), uintptr(unsafe.Pointer(&v)), 1, uintptr(off), 0, unix.RWF_NOWAIT)
	runtime.KeepAlive(f)
	if errno != 0 {
		return 0
	}
	return int(n)
}
