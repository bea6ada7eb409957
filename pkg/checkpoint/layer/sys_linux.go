package layer

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// openRoot opens the directory of a tree; it must not be a symbolic link.
func openRoot(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return fd, nil
}

// beneath opens a clean relative path below root through no symbolic link and
// into no other mount (EXDEV). A link at the end is opened itself.
func beneath(root int, name string, flags uint64) (int, error) {
	fd, err := unix.Openat2(root, name, &unix.OpenHow{
		Flags:   flags | unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return fd, nil
}

// procPath names the very file that fd is open on, for system calls that take
// no O_PATH descriptor. The kernel jumps to the file, even if it is a symbolic
// link, and follows nothing further.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// reopen opens the file behind an O_PATH descriptor for reading.
func reopen(fd, flags int) (*os.File, error) {
	p := procPath(fd)
	// O_NOATIME: reading must not change the tree. It needs the owner or
	// CAP_FOWNER. O_NONBLOCK: whatever lies there, opening does not wait.
	n, err := unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOATIME|flags, 0)
	if err == unix.EPERM {
		n, err = unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|flags, 0)
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(n), p), nil
}

// readXattrs returns what belongs in a layer, in the order of names, and how
// many other attributes there are besides the overlay's bookkeeping.
func readXattrs(fd int) (xattrs []xattr, dropped int64, err error) {
	p := procPath(fd)
	list, err := growing(func(b []byte) (int, error) { return unix.Listxattr(p, b) })
	if err == unix.ENOTSUP {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	names := strings.FieldsFunc(string(list), func(r rune) bool { return r == 0 })
	slices.Sort(names)
	total := 0
	for _, name := range names {
		if overlayBookkeeping(name) {
			continue
		}
		value, err := growing(func(b []byte) (int, error) { return unix.Getxattr(p, name, b) })
		if err == unix.ENODATA {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, 0, fmt.Errorf("extended attribute %q: %w", name, err)
		}
		if !xattrAllowed(name, string(value)) {
			dropped++
			continue
		}
		if total += len(name) + len(value); total > maxXattrBytes {
			return nil, 0, fmt.Errorf("extended attributes: %w", unix.E2BIG)
		}
		xattrs = append(xattrs, xattr{name, string(value)})
	}
	return xattrs, dropped, nil
}

// growing calls read with a buffer that is large enough.
func growing(read func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		b := make([]byte, size)
		n, err := read(b)
		if err == unix.ERANGE && size < maxXattrValue {
			continue
		}
		if err != nil {
			return nil, err
		}
		return b[:n], nil
	}
}

// setTimes leaves a zero time alone.
func setTimes(fd int, atime, mtime time.Time) error {
	ts := make([]unix.Timespec, 2)
	for i, t := range []time.Time{atime, mtime} {
		if t.IsZero() {
			ts[i].Nsec = unix.UTIME_OMIT
			continue
		}
		ts[i] = unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, procPath(fd), ts, 0)
}

func statTimes(st *unix.Stat_t) (atime, mtime time.Time) {
	return time.Unix(st.Atim.Unix()), time.Unix(st.Mtim.Unix())
}

func chown(fd int, st *unix.Stat_t, uid, gid int) error {
	if int(st.Uid) == uid && int(st.Gid) == gid {
		return nil
	}
	return unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH)
}

// removeXattr is content with an attribute that is not there.
func removeXattr(fd int, name string) error {
	err := unix.Removexattr(procPath(fd), name)
	if err == unix.ENODATA || err == unix.ENOTSUP {
		return nil
	}
	return err
}

// dirCache keeps the directory that was used last open.
type dirCache struct {
	root int
	name string
	fd   int
	ok   bool
}

func (c *dirCache) open(name string) (int, error) {
	if c.ok && c.name == name {
		return c.fd, nil
	}
	c.close()
	fd, err := beneath(c.root, name, unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	c.name, c.fd, c.ok = name, fd, true
	return fd, nil
}

func (c *dirCache) close() {
	if c.ok {
		unix.Close(c.fd)
		c.ok = false
	}
}
