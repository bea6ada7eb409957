// Package eventlog reads the node's event log while others append to it, and
// rotates it.
//
// Invariants: a [Tailer] delivers each whole line once and in order, across a
// rotation too; what is no event, is too long, or has no end yet is never
// delivered. One process only, the daemon, rotates.
package eventlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// OldFileName is the log's name after a rotation.
const OldFileName = event.FileName + ".1"

const (
	maxLine   = 64 << 10 // longer than any event that event.Append writes
	chunkSize = 64 << 10
)

// Tailer follows the log. It is for one goroutine.
type Tailer struct {
	path    string
	f       *os.File
	partial []byte // the beginning of a line whose end is not written yet
	tooLong bool   // the rest of the line is to be thrown away
	rotated bool   // another file has the name by now; this one was read once more
	skipped int
}

// NewTailer follows the log under root, the store's root directory, from its
// present end, or from its beginning if all is true. The log may be absent yet.
func NewTailer(root string, all bool) (*Tailer, error) {
	t := &Tailer{path: filepath.Join(root, event.FileName)}
	if err := t.open(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if t.f != nil && !all {
		if _, err := t.f.Seek(0, io.SeekEnd); err != nil {
			t.f.Close()
			return nil, fmt.Errorf("event log: %w", err)
		}
	}
	return t, nil
}

// Close ends the following.
func (t *Tailer) Close() error {
	if t.f == nil {
		return nil
	}
	return t.f.Close()
}

// Skipped counts the lines so far that were no events.
func (t *Tailer) Skipped() int { return t.skipped }

func (t *Tailer) open() error {
	f, err := openLog(t.path)
	if err != nil {
		return err
	}
	t.f, t.partial, t.tooLong, t.rotated = f, nil, false, false
	return nil
}

// openLog opens a regular file, neither following a link nor waiting for the
// other end of a FIFO.
func openLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("event log: %w", err)
	}
	return f, nil
}

// Poll hands every event that was appended since the last call to fn.
func (t *Tailer) Poll(fn func(event.Event)) error {
	if t.f == nil {
		if err := t.open(); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
	}
	if err := t.drain(fn); err != nil {
		return err
	}
	mine, err := t.f.Stat()
	if err != nil {
		return fmt.Errorf("event log: %w", err)
	}
	switch named, err := os.Lstat(t.path); {
	case errors.Is(err, fs.ErrNotExist): // rotated, and nothing written since
	case err != nil:
		return fmt.Errorf("event log: %w", err)
	case !os.SameFile(mine, named):
		// A writer may have opened this file just before it lost its name: it
		// is read once more at the next call.
		if !t.rotated {
			t.rotated = true
			return nil
		}
		old := t.f
		if err := t.open(); err != nil {
			return err
		}
		old.Close()
		return t.drain(fn)
	}
	if at, err := t.f.Seek(0, io.SeekCurrent); err == nil && at > mine.Size() { // somebody truncated it
		t.partial, t.tooLong = nil, false
		if _, err := t.f.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("event log: %w", err)
		}
		return t.drain(fn)
	}
	return nil
}

func (t *Tailer) drain(fn func(event.Event)) error {
	buf := make([]byte, chunkSize)
	for {
		n, err := t.f.Read(buf)
		t.take(buf[:n], fn)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("event log: %w", err)
		}
	}
}

// take splits what was read into lines.
func (t *Tailer) take(b []byte, fn func(event.Event)) {
	for len(b) > 0 {
		line, rest, whole := bytes.Cut(b, []byte{'\n'})
		if len(t.partial)+len(line) > maxLine {
			t.partial, t.tooLong = nil, true
		} else if !t.tooLong {
			t.partial = append(t.partial, line...)
		}
		if whole {
			var e event.Event
			if t.tooLong || json.Unmarshal(t.partial, &e) != nil || e.Type == "" {
				t.skipped++
			} else {
				fn(e)
			}
			t.partial, t.tooLong = t.partial[:0], false
		}
		b = rest
	}
}

// Read hands all events of the log, the rotated one first, to fn. A log that is
// absent holds none.
func Read(root string, fn func(event.Event)) error {
	for _, name := range []string{OldFileName, event.FileName} {
		f, err := openLog(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		t := Tailer{f: f}
		err = t.drain(fn)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// Rotate gives the log its old name, replacing an older one, if it is larger
// than limit bytes. It reports whether it did.
func Rotate(root string, limit int64) (bool, error) {
	path := filepath.Join(root, event.FileName)
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && st.Size() <= limit {
		return false, nil
	}
	if err == nil {
		err = os.Rename(path, filepath.Join(root, OldFileName))
	}
	if err != nil {
		return false, fmt.Errorf("rotate the event log: %w", err)
	}
	return true, nil
}
