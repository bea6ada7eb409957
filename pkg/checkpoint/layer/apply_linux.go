package layer

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// Defaults of [Options].
const (
	DefaultMaxBytes   = 1 << 40
	DefaultMaxEntries = 1 << 20
)

// Options of [Apply].
type Options struct {
	// SkipExisting is for a tree that others use already: what is there stays
	// as it is, content and attributes, and only what is missing is made.
	SkipExisting bool
	// AllowDevices permits device nodes other than whiteouts. They are as
	// dangerous as the device cgroup of whoever will see the tree is lax.
	AllowDevices bool
	MaxBytes     int64 // contents of files, holes not counted; 0: DefaultMaxBytes
	MaxEntries   int64 // 0: DefaultMaxEntries
}

// Applied says what [Apply] made.
type Applied struct {
	Entries int64 // made, hard links included, the root not
	Bytes   int64 // contents of files, without holes
	Skipped int64 // left alone because of [Options.SkipExisting]

	dir      string
	root     inode
	before   *rootAttributes
	made     []node
	existing []dirTimes
}

// node is a name that Apply made.
type node struct {
	name string
	ino  uint64
	dir  bool
}

// dirTimes are the times of a directory that was there before.
type dirTimes struct {
	name         string
	atime, mtime time.Time
}

// rootAttributes are the root's, before Apply changed them.
type rootAttributes struct {
	st     unix.Stat_t
	xattrs []xattr
}

// Apply makes the tree of a layer in dir, which must exist and be no symbolic
// link: the empty upper directory of an overlay that is not mounted yet, or,
// with [Options.SkipExisting], a volume in use. Without that option a name that
// exists already is an error wrapping [os.ErrExist].
//
// On an error the result describes what was made so far. Apply takes nothing
// back by itself; the caller decides and calls [Applied.Undo].
//
// Errors wrap [checkpoint.ErrCorrupt] where the layer is not what Capture
// writes, [checkpoint.ErrInvalid] where it exceeds the options' bounds or holds
// a device that they forbid, and otherwise the cause (ENOSPC, for example).
//
// A hard link to a file that was skipped is skipped as well.
func Apply(ctx context.Context, r io.Reader, dir string, opt Options) (Applied, error) {
	if opt.MaxBytes == 0 {
		opt.MaxBytes = DefaultMaxBytes
	}
	if opt.MaxEntries == 0 {
		opt.MaxEntries = DefaultMaxEntries
	}
	a := &applier{opt: opt, inodes: map[string]uint64{}}
	a.out.dir = dir
	if err := a.run(ctx, bufio.NewReaderSize(r, streamSize)); err != nil {
		return a.out, fmt.Errorf("apply to %s: %w", dir, err)
	}
	return a.out, nil
}

type applier struct {
	opt     Options
	dec     *decoder
	parents dirCache
	buf     []byte
	inodes  map[string]uint64 // of each name made
	dirs    []finalDir
	hidden  string // a name that is no directory here, but is one in the layer
	out     Applied
}

// finalDir is what a directory gets after everything in it was made: only then
// its times last, and its mode does not stand in the way.
type finalDir struct {
	dirTimes
	ino  uint64
	mode uint32 // keepMode: leave it
}

const keepMode = ^uint32(0)

func (a *applier) run(ctx context.Context, r io.Reader) error {
	root, err := openRoot(a.out.dir)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return &os.PathError{Op: "stat", Path: a.out.dir, Err: err}
	}
	a.out.root = inode{st.Dev, st.Ino}
	a.parents.root = root
	defer a.parents.close()

	if a.dec, err = newDecoder(r); err != nil {
		return err
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := a.dec.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if a.dec.entries > a.opt.MaxEntries {
			return fmt.Errorf("layer: more than %d entries: %w", a.opt.MaxEntries, checkpoint.ErrInvalid)
		}
		if err := a.entry(ctx, e); err != nil {
			return fmt.Errorf("entry %.200q: %w", e.name, err)
		}
	}
	for _, d := range slices.Backward(a.dirs) {
		if err := a.finish(d); err != nil {
			return fmt.Errorf("entry %.200q: %w", d.name, err)
		}
	}
	return nil
}

func (a *applier) entry(ctx context.Context, e *entry) error {
	if e.name == "." {
		return a.rootEntry(e)
	}
	if a.hidden != "" && strings.HasPrefix(e.name, a.hidden+"/") {
		a.out.Skipped++
		return nil
	}
	if (e.Typeflag == tar.TypeChar || e.Typeflag == tar.TypeBlock) && !e.whiteout() && !a.opt.AllowDevices {
		return fmt.Errorf("device %d:%d is not allowed: %w", e.Devmajor, e.Devminor, checkpoint.ErrInvalid)
	}
	parent, err := a.parents.open(path.Dir(e.name))
	if err != nil {
		return err
	}
	fd, err := a.make(parent, path.Base(e.name), e)
	if errors.Is(err, unix.EEXIST) {
		return a.exists(parent, e, err)
	}
	if err != nil || fd < 0 {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	isDir := e.Typeflag == tar.TypeDir
	a.out.made = append(a.out.made, node{e.name, st.Ino, isDir})
	a.out.Entries++
	a.inodes[e.name] = st.Ino
	if e.Typeflag == tar.TypeLink {
		return nil
	}
	if e.Typeflag == tar.TypeReg {
		if err := a.content(ctx, fd, e); err != nil {
			return err
		}
	}
	if err := setAttributes(fd, &st, e); err != nil {
		return err
	}
	if isDir {
		a.dirs = append(a.dirs, finalDir{dirTimes{e.name, e.AccessTime, e.ModTime}, st.Ino, uint32(e.Mode)})
		return nil
	}
	if e.Typeflag != tar.TypeSymlink {
		if err := unix.Chmod(procPath(fd), uint32(e.Mode)); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	return setTimes(fd, e.AccessTime, e.ModTime)
}

// make makes the file and opens it; -1 without an error says that it was
// skipped. After an error nothing is left.
func (a *applier) make(parent int, base string, e *entry) (fd int, err error) {
	switch e.Typeflag {
	case tar.TypeReg:
		if left := a.opt.MaxBytes - a.out.Bytes; e.Size > left {
			return -1, fmt.Errorf("layer: more than %d bytes: %w", a.opt.MaxBytes, checkpoint.ErrInvalid)
		}
		return unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	case tar.TypeLink:
		return a.link(parent, base, e)
	case tar.TypeDir:
		err = unix.Mkdirat(parent, base, 0o700)
	case tar.TypeSymlink:
		err = unix.Symlinkat(e.Linkname, parent, base)
	case tar.TypeFifo:
		err = unix.Mknodat(parent, base, unix.S_IFIFO|0o600, 0)
	case tar.TypeChar, tar.TypeBlock:
		mode := uint32(unix.S_IFCHR | 0o600)
		if e.Typeflag == tar.TypeBlock {
			mode = unix.S_IFBLK | 0o600
		}
		err = unix.Mknodat(parent, base, mode, int(unix.Mkdev(uint32(e.Devmajor), uint32(e.Devminor))))
	}
	if err != nil {
		return -1, err
	}
	if fd, err = unix.Openat(parent, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err != nil {
		flags := 0
		if e.Typeflag == tar.TypeDir {
			flags = unix.AT_REMOVEDIR
		}
		return -1, errors.Join(err, unix.Unlinkat(parent, base, flags))
	}
	return fd, nil
}

// link makes a hard link, only ever to a file that this Apply made.
func (a *applier) link(parent int, base string, e *entry) (int, error) {
	ino, ok := a.inodes[e.target]
	if !ok {
		if a.opt.SkipExisting {
			a.out.Skipped++
			return -1, nil
		}
		return -1, corrupt("hard link to %.200q, which did not come before", e.target)
	}
	fd, err := beneath(a.parents.root, e.target, 0)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		switch {
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			err = corrupt("hard link to the directory %.200q", e.target)
		case st.Ino != ino:
			err = fmt.Errorf("hard link to %.200q, which was replaced meanwhile", e.target)
		default:
			err = unix.Linkat(unix.AT_FDCWD, procPath(fd), parent, base, unix.AT_SYMLINK_FOLLOW)
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// exists decides about a name that is there already.
func (a *applier) exists(parent int, e *entry, cause error) error {
	if _, ours := a.inodes[e.name]; ours {
		return corrupt("named twice")
	}
	if !a.opt.SkipExisting {
		return cause
	}
	a.out.Skipped++
	if e.Typeflag != tar.TypeDir {
		return nil
	}
	fd, err := unix.Openat(parent, path.Base(e.name), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		a.hidden = e.name
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return a.keepDir(e.name, fd)
}

// keepDir remembers the times of a directory that keeps its attributes, which
// new names in it would change.
func (a *applier) keepDir(name string, fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	d := dirTimes{name: name}
	d.atime, d.mtime = statTimes(&st)
	a.out.existing = append(a.out.existing, d)
	a.dirs = append(a.dirs, finalDir{d, st.Ino, keepMode})
	return nil
}

func (a *applier) rootEntry(e *entry) error {
	root := a.parents.root
	if a.opt.SkipExisting {
		return a.keepDir(".", root)
	}
	before := &rootAttributes{}
	if err := unix.Fstat(root, &before.st); err != nil {
		return err
	}
	var err error
	if before.xattrs, _, err = readXattrs(root); err != nil {
		return err
	}
	a.out.before = before
	a.dirs = append(a.dirs, finalDir{dirTimes{".", e.AccessTime, e.ModTime}, before.st.Ino, uint32(e.Mode)})
	return setAttributes(root, &before.st, e)
}

// content fills a new file; holes stay holes.
func (a *applier) content(ctx context.Context, fd int, e *entry) error {
	for _, s := range e.data {
		for s.len > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			a.buf = grown(a.buf, min(s.len, bufferSize))
			b := a.buf
			if err := a.dec.body(b); err != nil {
				return err
			}
			for len(b) > 0 {
				n, err := unix.Pwrite(fd, b, s.off)
				if err != nil {
					return fmt.Errorf("write: %w", err)
				}
				b = b[n:]
				s.off += int64(n)
				s.len -= int64(n)
				a.out.Bytes += int64(n)
			}
		}
	}
	if n := len(e.data); n == 0 && e.size > 0 || n > 0 && e.data[n-1].off+e.data[n-1].len < e.size {
		if err := unix.Ftruncate(fd, e.size); err != nil {
			return fmt.Errorf("truncate: %w", err)
		}
	}
	return nil
}

// setAttributes sets owner and extended attributes, in this order, for a change
// of owner drops security.capability. The caller sets the mode afterwards: chown
// drops set-ID bits, and a file without write permission takes no user.* from
// anyone but root.
func setAttributes(fd int, st *unix.Stat_t, e *entry) error {
	if err := chown(fd, st, e.Uid, e.Gid); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if e.Typeflag != tar.TypeSymlink {
		// A default ACL of the parent has been inherited.
		for _, acl := range []string{xattrACLAccess, xattrACLDefault} {
			if _, ok := e.xattr(acl); !ok {
				if err := removeXattr(fd, acl); err != nil {
					return fmt.Errorf("remove %s: %w", acl, err)
				}
			}
		}
	}
	for _, x := range e.xattrs {
		if err := unix.Setxattr(procPath(fd), x.name, []byte(x.value), 0); err != nil {
			return fmt.Errorf("extended attribute %q: %w", x.name, err)
		}
	}
	return nil
}

// finish sets a directory's mode and times. A directory that was replaced
// meanwhile by somebody else is theirs.
func (a *applier) finish(d finalDir) error {
	fd, err := beneath(a.parents.root, d.name, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Ino != d.ino {
		return nil
	}
	if d.mode != keepMode {
		if err := unix.Chmod(procPath(fd), d.mode); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	return setTimes(fd, d.atime, d.mtime)
}

// Undo removes what Apply made and nothing else, in reverse order, and gives
// the root and the directories that were there their attributes and times back.
// A name that somebody else replaced or removed since then is left alone; a
// directory that somebody else put something into stays and is an error. Undo
// goes on after an error and joins them. It may be called again, but not while
// an overlay is mounted over the directory.
func (a Applied) Undo() error {
	if a.root == (inode{}) {
		return nil // dir was not even opened
	}
	root, err := openRoot(a.dir)
	if err != nil {
		return fmt.Errorf("layer: undo: %w", err)
	}
	defer unix.Close(root)
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil || (inode{st.Dev, st.Ino}) != a.root {
		return fmt.Errorf("layer: undo: %s is another directory now", a.dir)
	}
	parents := dirCache{root: root}
	defer parents.close()
	var errs []error
	for _, n := range slices.Backward(a.made) {
		if err := n.remove(&parents); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("layer: undo: %w", err))
		}
	}
	for _, d := range slices.Backward(a.existing) {
		fd, err := beneath(root, d.name, unix.O_DIRECTORY)
		if err != nil {
			continue // replaced or removed by somebody else
		}
		if err := d.restore(fd); err != nil {
			errs = append(errs, fmt.Errorf("layer: undo: times of %q: %w", d.name, err))
		}
		unix.Close(fd)
	}
	if a.before != nil {
		if err := a.before.restore(root); err != nil {
			errs = append(errs, fmt.Errorf("layer: undo: attributes of %s: %w", a.dir, err))
		}
	}
	return errors.Join(errs...)
}

func (d dirTimes) restore(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if _, mtime := statTimes(&st); mtime.Equal(d.mtime) {
		return nil // nothing was made in it
	}
	return setTimes(fd, d.atime, d.mtime)
}

func (n node) remove(parents *dirCache) error {
	parent, err := parents.open(path.Dir(n.name))
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(parent, path.Base(n.name), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: n.name, Err: err}
	}
	if st.Ino != n.ino {
		return nil
	}
	flags := 0
	if n.dir {
		flags = unix.AT_REMOVEDIR
	}
	if err := unix.Unlinkat(parent, path.Base(n.name), flags); err != nil {
		return &os.PathError{Op: "remove", Path: n.name, Err: err}
	}
	return nil
}

func (b *rootAttributes) restore(root int) error {
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return err
	}
	if err := chown(root, &st, int(b.st.Uid), int(b.st.Gid)); err != nil {
		return err
	}
	now, _, err := readXattrs(root)
	if err != nil {
		return err
	}
	for _, x := range now {
		if !slices.ContainsFunc(b.xattrs, func(y xattr) bool { return x.name == y.name }) {
			if err := removeXattr(root, x.name); err != nil {
				return err
			}
		}
	}
	for _, x := range b.xattrs {
		if err := unix.Setxattr(procPath(root), x.name, []byte(x.value), 0); err != nil {
			return err
		}
	}
	if err := unix.Chmod(procPath(root), b.st.Mode&0o7777); err != nil {
		return err
	}
	atime, mtime := statTimes(&b.st)
	return setTimes(root, atime, mtime)
}
