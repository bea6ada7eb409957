package criu

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// Bounds on what is accepted from an image directory. They are far above what
// CRIU writes for a container of 65536 tasks.
const (
	maxImageBytes = 256 << 20 // one image file, other than pages
	maxEntryBytes = 16 << 20  // one message; mm-PID.img is a single one
	maxEntries    = 1 << 22   // messages in a file
	maxTasks      = 1 << 16   // processes or threads in pstree.img
	maxMappings   = 1 << 18   // mappings of a process
)

// Magic numbers, CRIU criu/include/magic.h.
const (
	magicCommon    = 0x54564319 // heads every image but the inventory
	magicService   = 0x55105940 // heads statistics
	magicInventory = 0x58313116
	magicPstree    = 0x50273030
	magicCore      = 0x55053847
	magicMM        = 0x57492820
	magicPagemap   = 0x56084025
	magicFdinfo    = 0x56213732
	magicFiles     = 0x56303138
	magicRemap     = 0x59133954
	magicMounts    = 0x55563928
	magicUTS       = 0x54473203
	magicStats     = 0x57093306
	magicUnixSk    = 0x54373943
)

// images is an open image directory.
type images struct {
	path string
	fd   int
}

// openImages opens the image directory; a symbolic link is refused.
func openImages(path string) (*images, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open image directory", Path: path, Err: err}
	}
	return &images{path: path, fd: fd}, nil
}

func (d *images) Close() error { return unix.Close(d.fd) }

// names lists the files whose name matches the pattern of [filepath.Match].
func (d *images) names(pattern string) ([]string, error) {
	fd, err := unix.Openat(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: d.path, Err: err}
	}
	f := os.NewFile(uintptr(fd), d.path)
	defer f.Close()
	var found []string
	for total := 0; ; {
		batch, err := f.Readdirnames(1024)
		for _, n := range batch {
			if ok, _ := filepath.Match(pattern, n); ok {
				found = append(found, n)
			}
		}
		if total += len(batch); total > 16*maxTasks {
			return nil, d.corrupt(".", "more than %d files", 16*maxTasks)
		}
		if errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func (d *images) corrupt(name, format string, a ...any) error {
	return fmt.Errorf("image %s: "+format+": %w", append(append([]any{name}, a...), checkpoint.ErrCorrupt)...)
}

// image reads the messages of one image file, one after another.
type image struct {
	d       *images
	name    string
	r       *bufio.Reader
	f       io.Closer
	left    int64 // bytes not yet read
	entries int
}

// openRegular opens a regular file of at most limit bytes, neither following a
// link nor waiting for the other end of a FIFO.
func openRegular(dirfd int, name string, limit int64) (*os.File, int64, error) {
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		err := &os.PathError{Op: "open", Path: name, Err: err}
		if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
			return nil, 0, fmt.Errorf("%w: %w", err, checkpoint.ErrCorrupt)
		}
		return nil, 0, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, 0, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return nil, 0, fmt.Errorf("%s: not a regular file: %w", name, checkpoint.ErrCorrupt)
	}
	if limit >= 0 && st.Size > limit {
		unix.Close(fd)
		return nil, 0, fmt.Errorf("%s: %d bytes, at most %d are accepted: %w", name, st.Size, limit, checkpoint.ErrCorrupt)
	}
	return os.NewFile(uintptr(fd), name), st.Size, nil
}

// open opens an image and checks its head. The error of an absent file matches
// [os.ErrNotExist].
func (d *images) open(name string, magics ...uint32) (*image, error) {
	f, size, err := openRegular(d.fd, name, maxImageBytes)
	if err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	img, err := newImage(d, name, f, size, magics...)
	if err != nil {
		f.Close()
		return nil, err
	}
	img.f = f
	return img, nil
}

func newImage(d *images, name string, r io.Reader, size int64, magics ...uint32) (*image, error) {
	img := &image{d: d, name: name, r: bufio.NewReaderSize(r, int(min(size, 64<<10))), left: size}
	for _, want := range magics {
		got, err := img.u32()
		if err != nil {
			return nil, d.corrupt(name, "no head")
		}
		if got != want {
			return nil, d.corrupt(name, "magic %#x, want %#x", got, want)
		}
	}
	return img, nil
}

func (i *image) Close() error { return i.f.Close() }

func (i *image) u32() (uint32, error) {
	if i.left == 0 {
		return 0, io.EOF
	}
	var b [4]byte
	if i.left < 4 {
		return 0, io.ErrUnexpectedEOF
	}
	if _, err := io.ReadFull(i.r, b[:]); err != nil {
		return 0, err
	}
	i.left -= 4
	return binary.LittleEndian.Uint32(b[:]), nil
}

// next reads the next message into m. It returns io.EOF at the end of the file,
// after a whole message. Unknown fields, and values of enumerations that
// go-criu does not know, stay in m's unknown fields and are no error, so that
// images of a newer CRIU can be read.
func (i *image) next(m proto.Message) error {
	n, err := i.u32()
	if errors.Is(err, io.EOF) {
		return io.EOF
	}
	if err != nil {
		return i.bad("length of message %d: %v", i.entries, err)
	}
	if i.entries++; i.entries > maxEntries {
		return i.bad("more than %d messages", maxEntries)
	}
	if n > maxEntryBytes || int64(n) > i.left {
		return i.bad("message %d of %d bytes, %d are left", i.entries, n, i.left)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(i.r, b); err != nil {
		return i.bad("message %d: %v", i.entries, err)
	}
	i.left -= int64(n)
	if err := (proto.UnmarshalOptions{AllowPartial: true, RecursionLimit: 32}).Unmarshal(b, m); err != nil {
		return i.bad("message %d: %v", i.entries, err)
	}
	return nil
}

func (i *image) bad(format string, a ...any) error { return i.d.corrupt(i.name, format, a...) }

// one reads an image that holds exactly one message, or more raw data after it.
func (d *images) one(m proto.Message, name string, magics ...uint32) error {
	img, err := d.open(name, magics...)
	if err != nil {
		return err
	}
	defer img.Close()
	if err := img.next(m); err != nil {
		if errors.Is(err, io.EOF) {
			return img.bad("empty")
		}
		return err
	}
	return nil
}

// each calls f with every message of an image; m is used anew for each.
func each[M proto.Message](d *images, name string, magic uint32, m M, f func(M) error) error {
	img, err := d.open(name, magicCommon, magic)
	if err != nil {
		return err
	}
	defer img.Close()
	for {
		proto.Reset(m)
		if err := img.next(m); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := f(m); err != nil {
			return err
		}
	}
}

// replace writes an image anew, of these messages.
func (d *images) replace(name string, magic uint32, ms ...proto.Message) error {
	out := binary.LittleEndian.AppendUint32(nil, magicCommon)
	out = binary.LittleEndian.AppendUint32(out, magic)
	for _, m := range ms {
		b, err := (proto.MarshalOptions{AllowPartial: true}).Marshal(m)
		if err != nil {
			return d.corrupt(name, "%v", err)
		}
		out = append(binary.LittleEndian.AppendUint32(out, uint32(len(b))), b...)
	}
	if err := replaceAt(d.fd, name, out); err != nil {
		return fmt.Errorf("image %s: %w", filepath.Join(d.path, name), err)
	}
	return nil
}
