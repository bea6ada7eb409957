package pager

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

// content is a file of pages, with the checksums of its blocks where they are known.
type content struct {
	file   *os.File
	size   int64
	blocks *checkpoint.Blocks // nil for none
}

// window is the part of a file of pages that was read last. It is checked as a
// whole, so that pieces smaller than a block, one after the other, cost one read.
// It has one user.
type window struct {
	from *content
	off  int64
	data []byte
	buf  []byte
}

// read returns size bytes of the file, at an offset. They are valid until the
// next call.
func (w *window) read(c *content, off, size int64) ([]byte, error) {
	if off < 0 || size > c.size-off {
		return nil, io.ErrUnexpectedEOF
	}
	if w.from == c && off >= w.off && off+size <= w.off+int64(len(w.data)) {
		return w.data[off-w.off:][:size], nil
	}
	start, end := off, off+size
	if c.blocks != nil {
		b := c.blocks.SizeBytes
		start, end = off/b*b, min((end+b-1)/b*b, c.size)
	}
	w.from = nil
	if int64(cap(w.buf)) < end-start {
		w.buf = make([]byte, end-start)
	}
	w.data = w.buf[:end-start]
	if cached := readCached(c.file, w.data, start); cached < len(w.data) {
		if _, err := c.file.ReadAt(w.data[cached:], start+int64(cached)); err != nil {
			return nil, err
		}
	}
	if c.blocks != nil {
		if err := c.blocks.Check(start/c.blocks.SizeBytes, w.data); err != nil {
			return nil, fmt.Errorf("image %s: %w", filepath.Base(c.file.Name()), err)
		}
		w.from, w.off = c, start
	}
	return w.data[off-start:][:size], nil
}

// contentOf takes the files of pages of all tasks, by the process, and gives
// them the checksums of their blocks.
//
// Where these are all that vouches for a file, what of it no task has as lazy
// memory is checked here: CRIU reads that itself, and checks nothing.
func contentOf(imageDir string, mem *criu.LazyMemory, sums map[string]checkpoint.File) (map[uint32]*content, error) {
	contents := map[uint32]*content{}
	lazy := map[string][]span{} // by file, with its offsets as addresses
	for _, t := range mem.Tasks {
		if t.Pages == nil {
			continue
		}
		name := filepath.Base(t.Pages.Name())
		f := sums[name]
		if f.Blocks != nil && f.SizeBytes != t.PagesSize {
			return nil, fmt.Errorf("image %s has %d bytes, want %d: %w", name, t.PagesSize, f.SizeBytes, checkpoint.ErrCorrupt)
		}
		contents[t.PID] = &content{t.Pages, t.PagesSize, f.Blocks}
		for _, r := range t.Runs {
			lazy[name] = append(lazy[name], span{addr: uint64(r.Off), size: r.Size})
		}
	}
	for name, f := range sums {
		if err := checkRest(filepath.Join(imageDir, name), f, lazy[name]); err != nil {
			return nil, err
		}
	}
	return contents, nil
}

// checkRest checks the blocks of a file that are not as a whole in the spans.
func checkRest(name string, f checkpoint.File, lazy []span) error {
	sortSpans(lazy)
	file, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	c, w := &content{file, f.SizeBytes, f.Blocks}, window{}
	check := func(start, end int64) error { // widened to blocks, one at a time
		if start >= end {
			return nil // two runs meet here, within a block perhaps
		}
		b := f.Blocks.SizeBytes
		for at := start / b * b; at < end; at += b {
			if _, err := w.read(c, at, min(b, f.SizeBytes-at)); err != nil {
				return err
			}
		}
		return nil
	}
	at := int64(0)
	for _, s := range lazy {
		if err := check(at, int64(s.addr)); err != nil {
			return err
		}
		at = max(at, int64(s.end()))
	}
	return check(at, f.SizeBytes)
}
