package pager

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

const (
	// HotSize is the size of a [Range].
	HotSize = 64 << 10
	// MaxHot bounds how many ranges are recorded: 64 MiB, what takes some hundredths
	// of a second.
	MaxHot = 1024
	// HotAfter is for how many containers in a row a range must have been missing
	// before it is hot: what each asks for at the start is, what one of them happens
	// to ask for is not.
	HotAfter = 3
	// hotTime is how long what is asked for is recorded, from the first time after
	// CRIU's last message on.
	hotTime = 100 * time.Millisecond

	hotDir   = "hot"
	hotHead  = "stasis-hot 2\n"
	hotLimit = int64(len(hotHead) + MaxHot*len("4294967295 0xffffffffffffffff 3\n"))
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
	switch {
	case p.sinceRestored() < 0:
	case p.hotSince.IsZero():
		p.hotSince = time.Now()
	case time.Since(p.hotSince) > hotTime:
		return
	}
	if len(p.touched) < MaxHot && !p.touchedOnce[r] {
		p.touched = append(p.touched, r)
		p.touchedOnce[r] = true
	}
}

// Touched is the memory with content in the images that tasks have waited for at
// the start, in the order in which they first did, each range once, at most [MaxHot].
// Memory that a task has moved is named by where it was then.
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
// template: a line "stasis-hot 2", and one for each range, in the order in which
// they are to be filled: the process's number, a space, the address in hexadecimal
// with 0x before it, a space, and for how many containers in a row the range was
// missing, from 1 to [HotAfter]. It is a hint, and lost at a reboot.
func HotFile(runtimeDir string, version checkpoint.ID) string {
	return filepath.Join(runtimeDir, hotDir, string(version))
}

// ReadHot reads what is hot of a record. Where there is none it is nothing; what is
// none is an error that wraps [checkpoint.ErrCorrupt].
func ReadHot(name string) ([]Range, error) {
	asked, err := readAsked(name)
	var hot []Range
	for _, a := range asked {
		if a.count == HotAfter {
			hot = append(hot, a.Range)
		}
	}
	return hot, err
}

// asked is a line of a record.
type asked struct {
	Range
	count int // of containers, in a row; no more than [HotAfter]
}

func (a asked) line() string { return fmt.Sprintf("%d %#x %d", a.PID, a.Addr, a.count) }

func readAsked(name string) ([]asked, error) {
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
	all, err := parseHot(b)
	if err != nil {
		return nil, fmt.Errorf("recorded memory: %s: %w", name, err)
	}
	return all, nil
}

func parseHot(b []byte) ([]asked, error) {
	rest, ok := bytes.CutPrefix(b, []byte(hotHead))
	if !ok {
		return nil, fmt.Errorf("another head: %w", checkpoint.ErrCorrupt)
	}
	var all []asked
	for line := range strings.Lines(string(rest)) {
		var a asked
		line = strings.TrimSuffix(line, "\n")
		n, err := fmt.Sscanf(line, "%d 0x%x %d", &a.PID, &a.Addr, &a.count)
		if n != 3 || err != nil || !a.valid() || a.count < 1 || a.count > HotAfter || line != a.line() || len(all) == MaxHot {
			return nil, fmt.Errorf("line %d: %w", len(all)+2, checkpoint.ErrCorrupt)
		}
		all = append(all, a)
	}
	return all, nil
}

// AddHot brings a record up to date with what a container asked for, and makes it
// where there is none. What is hot remains so: since it is filled before, nobody has
// to ask for it. Who has asked for nothing tells nothing. A record that cannot be read
// is replaced. Of two that add at once one may lose what it adds.
func AddHot(name string, touched []Range) error {
	if len(touched) == 0 {
		return nil
	}
	before, err := readAsked(name)
	if err != nil && !errors.Is(err, checkpoint.ErrCorrupt) {
		return err
	}
	now := map[Range]bool{}
	for _, r := range touched {
		now[r] = r.valid()
	}
	var after []asked
	for _, a := range before {
		if now[a.Range] {
			a.count = min(a.count+1, HotAfter)
		}
		if now[a.Range] || a.count == HotAfter {
			after = append(after, a)
		}
		delete(now, a.Range)
	}
	for _, r := range touched {
		if now[r] && len(after) < MaxHot {
			after = append(after, asked{r, 1})
		}
		delete(now, r)
	}
	if slices.Equal(before, after) && err == nil {
		return nil
	}
	b := []byte(hotHead)
	for _, a := range after {
		b = append(append(b, a.line()...), '\n')
	}
	if err := fsys.Replace(name, b); err != nil {
		return fmt.Errorf("record memory: %w", err)
	}
	return nil
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
