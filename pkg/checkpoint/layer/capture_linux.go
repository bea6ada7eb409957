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
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// Stats says what [Capture] wrote and what it left out.
type Stats struct {
	Entries int64 // members of the layer, the root included
	Bytes   int64 // contents of files, without holes, headers and padding
	Sockets int64 // left out
	Mounts  int64 // mount points below the directory, left out with what is under them
	Xattrs  int64 // extended attributes left out, the overlay's bookkeeping not counted
}

// Capture writes the tree of dir, which must not be a symbolic link, to w as a
// layer. The same tree gives the same bytes.
//
// The tree should not change meanwhile. Where it does all the same, for a
// volume may be shared with containers that run on, a name that vanished is left
// out, and a file has the size it had when its turn came: what was added later is
// not read, what was cut off is zeros.
//
// Of extended attributes it saves user.*, security.capability, POSIX ACLs and
// what an overlay needs to find its lower files (opaque, redirect, metacopy,
// whiteout, protattr, and escaped ones of nested overlays). It leaves out labels
// that the next container gets anew (security.selinux), signatures bound to
// inodes (security.evm), and the overlay's bookkeeping.
//
// A path longer than PATH_MAX is an error wrapping [checkpoint.ErrUnsupported].
func Capture(ctx context.Context, w io.Writer, dir string) (Stats, error) {
	root, err := openRoot(dir)
	if err != nil {
		return Stats{}, fmt.Errorf("layer: capture: %w", err)
	}
	defer unix.Close(root)
	bw := bufio.NewWriterSize(w, streamSize)
	c := &capturer{root: root, links: map[inode]string{}}
	if c.enc, err = newEncoder(bw); err == nil {
		if err = c.visit(ctx, "."); err == nil {
			if err = c.enc.close(); err == nil {
				err = bw.Flush()
			}
		}
	}
	c.stats.Entries = c.enc.entries
	if err != nil {
		return c.stats, fmt.Errorf("layer: capture %s: %w", dir, err)
	}
	return c.stats, nil
}

type inode struct{ dev, ino uint64 }

type capturer struct {
	root  int
	enc   *encoder
	buf   []byte
	links map[inode]string // first path of a file with several
	stats Stats
}

// visit writes the entry of that name and everything below it.
func (c *capturer) visit(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(name) > maxPath {
		return fmt.Errorf("path of %d bytes, %.100q...: %w", len(name), name, checkpoint.ErrUnsupported)
	}
	children, err := c.entry(ctx, name)
	if err != nil {
		return err
	}
	for _, child := range children {
		if err := c.visit(ctx, path.Join(name, child)); err != nil {
			return err
		}
	}
	return nil
}

// entry writes one entry and returns the names in it if it is a directory.
func (c *capturer) entry(ctx context.Context, name string) (children []string, err error) {
	fd, err := beneath(c.root, name, 0)
	switch {
	case err == nil:
	case name != "." && errors.Is(err, unix.ENOENT):
		return nil, nil
	case errors.Is(err, unix.EXDEV):
		c.stats.Mounts++
		return nil, nil
	default:
		return nil, err
	}
	defer unix.Close(fd)
	fail := func(err error) ([]string, error) { return nil, fmt.Errorf("%s: %w", name, err) }
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fail(err)
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		PAXRecords: map[string]string{},
	}
	h.AccessTime, h.ModTime = statTimes(&st)
	whiteout := false
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFSOCK:
		c.stats.Sockets++
		return nil, nil
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case unix.S_IFREG:
		h.Typeflag = tar.TypeReg
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		h.AccessTime = time.Time{} // reading the link changes it
		c.buf = grown(c.buf, maxPath+1)
		n, err := unix.Readlinkat(fd, "", c.buf)
		if err != nil {
			return fail(err)
		}
		h.Linkname = string(c.buf[:n])
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		whiteout = h.Typeflag == tar.TypeChar && st.Rdev == 0
	default:
		return fail(fmt.Errorf("file type %#o: %w", st.Mode, checkpoint.ErrUnsupported))
	}
	// Whiteouts share one inode since Linux 5.8; as entries of their own they
	// mean the same and do not depend on each other.
	if st.Nlink > 1 && h.Typeflag != tar.TypeDir && !whiteout {
		id := inode{st.Dev, st.Ino}
		if first, ok := c.links[id]; ok {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			h.Devmajor, h.Devminor = 0, 0
			return nil, c.enc.header(h)
		}
		c.links[id] = name
	}
	xattrs, dropped, err := readXattrs(fd)
	if err != nil {
		return fail(err)
	}
	c.stats.Xattrs += dropped
	paxXattrs(h.PAXRecords, xattrs)
	switch h.Typeflag {
	case tar.TypeReg:
		if err := c.regular(ctx, fd, h, st.Size); err != nil {
			return fail(err)
		}
		return nil, nil
	case tar.TypeDir:
		d, err := reopen(fd, unix.O_DIRECTORY)
		if err != nil {
			return fail(err)
		}
		defer d.Close()
		if children, err = d.Readdirnames(-1); err != nil {
			return fail(err)
		}
		slices.Sort(children)
	}
	return children, c.enc.header(h)
}

// regular writes a file of that size.
func (c *capturer) regular(ctx context.Context, fd int, h *tar.Header, size int64) error {
	if size == 0 {
		return c.enc.header(h)
	}
	f, err := reopen(fd, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	segs, err := dataSegments(f, size)
	if err != nil {
		return err
	}
	for _, s := range segs {
		h.Size += s.len
	}
	if h.Size != size {
		h.PAXRecords[recordSparse] = formatSparse(size, segs)
	}
	if err := c.enc.header(h); err != nil {
		return err
	}
	for _, s := range segs {
		for s.len > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			c.buf = grown(c.buf, min(s.len, bufferSize))
			b := c.buf
			n, err := f.ReadAt(b, s.off)
			if err != nil && err != io.EOF {
				return err
			}
			clear(b[n:]) // the file was cut off meanwhile
			if _, err := c.enc.tw.Write(b); err != nil {
				return err
			}
			s.off += int64(len(b))
			s.len -= int64(len(b))
			c.stats.Bytes += int64(len(b))
		}
	}
	return nil
}

// dataSegments asks the file system where data lies. A file in too many pieces
// gets fewer, larger ones, with the smallest holes in them as zeros.
func dataSegments(f *os.File, size int64) ([]segment, error) {
	var segs []segment
	gap := int64(4096)
	for off := int64(0); off < size; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err == unix.ENXIO || err == nil && start >= size {
			break
		}
		if err == unix.EINVAL || err == unix.ENOTSUP {
			return []segment{{0, size}}, nil // no such notion here
		}
		if err != nil {
			return nil, fmt.Errorf("seek data: %w", err)
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err == unix.ENXIO || err == nil && (end <= start || end > size) {
			end = size // changed meanwhile
		} else if err != nil {
			return nil, fmt.Errorf("seek hole: %w", err)
		}
		segs = append(segs, segment{start, end - start})
		for off = end; len(segs) > maxSegments; gap *= 2 {
			segs = mergeSegments(segs, gap)
		}
	}
	return segs, nil
}

// mergeSegments fills holes of at most gap bytes.
func mergeSegments(segs []segment, gap int64) []segment {
	merged := segs[:1]
	for _, s := range segs[1:] {
		last := &merged[len(merged)-1]
		if s.off-last.off-last.len <= gap {
			last.len = s.off + s.len - last.off
		} else {
			merged = append(merged, s)
		}
	}
	return merged
}
