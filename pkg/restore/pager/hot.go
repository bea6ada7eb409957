package pager

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

const (
	// HotSize is the size of a [Range].
	HotSize = 64 << 10
	// MaxHot bounds how many ranges are recorded: 256 MiB, what takes a tenth of a
	// second.
	MaxHot = 4096

	hotDir   = "hot"
	hotHead  = "stasis-hot 1\n"
	hotLimit = int64(len(hotHead) + MaxHot*len("4294967295 0xffffffffffffffff\n"))
)

// Range is memory that was asked for: HotSize bytes from Addr on, which is a
// multiple of that, of a process of the images.
type Range struct {
	PID  uint32
	Addr uint64
}

func (r Range) valid() bool {
	return r.PID != 0 && r.Addr%HotSize == 0 && r.Addr+HotSize > r.Addr
}

// touch records that memory was asked for.
func (p *Pager) touch(pid uint32, addr uint64) {
	r := Range{pid, addr &^ (HotSize - 1)}
	p.hotMu.Lock()
	defer p.hotMu.Unlock()
	if len(p.touched) < MaxHot && !p.touchedOnce[r] {
		p.touched = append(p.touched, r)
		p.touchedOnce[r] = true
	}
}

// Touched is the memory with content in the images that tasks have waited for, in
// the order in which they first did, each range once, at most [MaxHot]. Memory
// that a task has moved is named by where it was then.
func (p *Pager) Touched() []Range {
	p.hotMu.Lock()
	defer p.hotMu.Unlock()
	return slices.Clone(p.touched)
}

// hotFirst is the order of the bulk: first what lies in the ranges, in their
// order, marked hot, then the rest as it was. The spans are sorted by address. Of
// the ranges it returns how many there is something in.
func hotFirst(spans []span, pid uint32, hot []Range) (ordered []span, used int) {
	seen := map[Range]bool{}
	last := -1 // the span that the last part is of
	for _, r := range hot {
		if r.PID != pid || !r.valid() || seen[r] {
			continue
		}
		i, _ := slices.BinarySearchFunc(spans, r.Addr, func(s span, addr uint64) int {
			return cmp.Compare(s.end(), addr+1) // the first that ends behind it
		})
		for from := i; i < len(spans) && spans[i].addr < r.Addr+HotSize; i++ {
			if i == from {
				seen[r] = true
				used++
			}
			c := spans[i].part(r.Addr, r.Addr+HotSize)
			c.hot = true
			if n := len(ordered); last == i && ordered[n-1].end() == c.addr {
				ordered[n-1].size += c.size
			} else {
				ordered = append(ordered, c)
			}
			last = i
		}
	}
	if used == 0 {
		return slices.Clone(spans), 0
	}
	for _, s := range spans {
		for at := s.addr; at < s.end(); {
			block := at &^ (HotSize - 1)
			if seen[Range{pid, block}] {
				at = block + HotSize
				continue
			}
			end := block + HotSize
			for end < s.end() && !seen[Range{pid, end}] {
				end += HotSize
			}
			ordered = append(ordered, s.part(at, end))
			at = end
		}
	}
	return ordered, used
}

// HotFile is the record of what containers ask for that begin from a version of a
// template: a line "stasis-hot 1", and one for each range, in the order in which
// they are to be filled: the process's number, a space, and the address in
// hexadecimal with 0x before it. It is a hint, and lost at a reboot.
func HotFile(runtimeDir string, version checkpoint.ID) string {
	return filepath.Join(runtimeDir, hotDir, string(version))
}

// ReadHot reads a record. Where there is none it is empty; what is none is an
// error that wraps [checkpoint.ErrCorrupt].
func ReadHot(name string) ([]Range, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("recorded memory: %w", err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() || fi.Size() > hotLimit {
		return nil, errors.Join(err, fmt.Errorf("recorded memory: %s: no file of at most %d bytes: %w", name, hotLimit, checkpoint.ErrCorrupt))
	}
	b, err := io.ReadAll(io.LimitReader(f, hotLimit))
	if err != nil {
		return nil, fmt.Errorf("recorded memory: %w", err)
	}
	ranges, err := parseHot(b)
	if err != nil {
		return nil, fmt.Errorf("recorded memory: %s: %w", name, err)
	}
	return ranges, nil
}

func parseHot(b []byte) ([]Range, error) {
	rest, ok := bytes.CutPrefix(b, []byte(hotHead))
	if !ok {
		return nil, fmt.Errorf("another head: %w", checkpoint.ErrCorrupt)
	}
	var ranges []Range
	lines := bufio.NewScanner(bytes.NewReader(rest))
	for lines.Scan() {
		var r Range
		line := lines.Text()
		if n, err := fmt.Sscanf(line, "%d 0x%x", &r.PID, &r.Addr); n != 2 || err != nil || !r.valid() || line != r.line() || len(ranges) == MaxHot {
			return nil, fmt.Errorf("line %d: %w", len(ranges)+2, checkpoint.ErrCorrupt)
		}
		ranges = append(ranges, r)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("line %d: %w: %w", len(ranges)+2, err, checkpoint.ErrCorrupt)
	}
	return ranges, nil
}

func (r Range) line() string { return fmt.Sprintf("%d %#x", r.PID, r.Addr) }

// AddHot adds to a record what was asked for and is not yet in it, and makes it
// where there is none. A record that cannot be read is replaced. Of two that add
// at once one may lose what it adds.
func AddHot(name string, touched []Range) error {
	ranges, err := ReadHot(name)
	if err != nil && !errors.Is(err, checkpoint.ErrCorrupt) {
		return err
	}
	known := map[Range]bool{}
	for _, r := range ranges {
		known[r] = true
	}
	before := len(ranges)
	for _, r := range touched {
		if len(ranges) < MaxHot && r.valid() && !known[r] {
			known[r] = true
			ranges = append(ranges, r)
		}
	}
	if len(ranges) == before {
		return nil
	}
	b := []byte(hotHead)
	for _, r := range ranges {
		b = append(append(b, r.line()...), '\n')
	}
	if err := replaceHot(name, b); err != nil {
		return fmt.Errorf("record memory: %w", err)
	}
	return nil
}

func replaceHot(name string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		if err = os.Rename(f.Name(), name); err == nil {
			return nil
		}
	}
	return errors.Join(err, os.Remove(f.Name()))
}

// SweepHot removes the records of all versions but those that there are, which are
// asked for after the records were listed: one of a version that is made meanwhile
// stays.
func SweepHot(runtimeDir string, versions func() ([]checkpoint.ID, error)) error {
	dir := filepath.Join(runtimeDir, hotDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("recorded memory: %w", err)
	}
	keep, err := versions()
	if err != nil {
		return fmt.Errorf("recorded memory: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !slices.Contains(keep, checkpoint.ID(e.Name())) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
