package pager

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// TestHotFirst: whatever the ranges are, all memory is there once, in pieces of
// the spans that there were; what lies in the ranges comes first, in their order.
func TestHotFirst(t *testing.T) {
	const pid, blocks = 7, 12
	r := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		var spans []span
		for addr, off := r.Uint64N(HotSize)&^(pageSize-1), int64(0); addr < blocks*HotSize; {
			c := span{addr: addr, size: (1 + r.Uint64N(40)) * pageSize, off: off, notInherited: r.IntN(2) == 0}
			spans = append(spans, c)
			addr, off = c.end()+r.Uint64N(30)*pageSize, off+int64(c.size)
		}
		var hot []Range
		for range r.IntN(8) {
			hot = append(hot, Range{pid, r.Uint64N(blocks+4) * HotSize}, Range{pid + 1, r.Uint64N(blocks) * HotSize})
			if r.IntN(4) == 0 { // nonsense
				hot = append(hot, Range{pid, 1 + r.Uint64N(HotSize-1)}, Range{pid, math.MaxUint64 - HotSize + 1}, Range{pid, math.MaxUint64}, Range{})
			}
		}
		got, used := hotFirst(slices.Clone(spans), pid, hot)

		if !maps.Equal(modelOf(t, got), modelOf(t, spans)) {
			t.Fatalf("%+v became %+v", spans, got)
		}
		rank, wantUsed := map[uint64]int{}, 0
		for i, h := range hot {
			if _, twice := rank[h.Addr]; h.PID != pid || h.Addr%HotSize != 0 || twice {
				continue
			}
			if slices.ContainsFunc(spans, func(s span) bool { return s.addr < h.Addr+HotSize && s.end() > h.Addr }) {
				rank[h.Addr] = i
				wantUsed++
			}
		}
		if used != wantUsed {
			t.Fatalf("%d ranges used, want %d", used, wantUsed)
		}
		var order []int
		var cold []uint64
		for _, c := range got {
			i := slices.IndexFunc(spans, func(s span) bool { return s.addr <= c.addr && s.end() >= c.end() && s.notInherited == c.notInherited })
			if i < 0 {
				t.Fatalf("%+v crosses the border of a span", c)
			}
			for addr := c.addr; addr < c.end(); addr += pageSize {
				at, isHot := rank[addr&^(HotSize-1)]
				if isHot != c.hot {
					t.Fatalf("%#x in %+v: hot is %v", addr, c, isHot)
				}
				if isHot {
					order = append(order, at)
				} else {
					cold = append(cold, addr)
				}
			}
			if c.hot && len(cold) > 0 {
				t.Fatalf("%+v comes after what is not hot", c)
			}
		}
		if !slices.IsSorted(order) || !slices.IsSorted(cold) {
			t.Fatalf("order %v, rest %#x", order, cold)
		}
	}
}

// TestHotSpace: a space with hot memory is filled before others.
func TestHotSpace(t *testing.T) {
	p := &Pager{ready: true, rest: true, spaces: map[int]*space{}}
	for i := range 20 {
		p.spaces[i] = &space{p: p, fd: i, watched: true, todo: []span{{addr: 1 << 20, size: HotSize}}}
	}
	p.spaces[13].todo[0].hot, p.spaces[7].todo[0].hot = true, true
	p.spaces[7].watched = false // nobody would hear of its events
	if s, hot := p.next(); s.fd != 13 || !hot {
		t.Errorf("space %d comes first", s.fd)
	}
	p.spaces[13].todo = nil
	if s, hot := p.next(); s.fd == 13 || hot {
		t.Error("a space with nothing to do")
	}
}

// TestNextWait: the server sleeps where there is nothing for it to copy, and only
// there.
func TestNextWait(t *testing.T) {
	for _, tt := range []struct {
		name               string
		again, piece, soon bool
		pause, quiet, want time.Duration
	}{
		{"a piece", false, true, false, 0, 0, 0},
		{"a piece after a fault", false, true, false, 0, quietTime, quietTime},
		{"a hot piece before CRIU is done", false, true, true, 0, 0, 0},
		{"memory that is not registered yet", false, false, true, 0, 0, retryWait},
		{"memory that is changing", true, true, false, 0, quietTime, retryWait},
		{"a crowd", false, true, false, busyTime, quietTime, busyTime},
		{"nothing", false, false, false, 0, quietTime, idleWait},
	} {
		if got := nextWait(tt.again, tt.piece, tt.soon, tt.pause, tt.quiet); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestQuiet: it is not quiet for a moment after a fault, but some seconds after the
// restore it is in any case.
func TestQuiet(t *testing.T) {
	p := &Pager{start: time.Now().Add(-time.Hour)}
	quiet := func(fault, restored time.Duration) time.Duration {
		p.lastFault.Store(int64(fault))
		p.restoredAt.Store(int64(restored))
		return p.quietIn()
	}
	now, later := time.Hour, time.Hour+time.Minute // on the pager's clock; later than the test
	if got := quiet(0, 0); got != 0 {
		t.Errorf("before any fault: %v", got)
	}
	if got := quiet(time.Minute, now); got != 0 {
		t.Errorf("long after a fault: %v", got)
	}
	for _, restored := range []time.Duration{0, now} {
		if got := quiet(later, restored); got < quietTime {
			t.Errorf("after a fault, restored at %v: %v", restored, got)
		}
	}
	if got := quiet(later, now-crowdTime-time.Second); got != 0 {
		t.Errorf("long after the restore: %v", got)
	}
}

// TestRestDelay: what is not hot waits for a while, and no longer.
func TestRestDelay(t *testing.T) {
	const delay = 200 * time.Millisecond
	p := &Pager{opt: Options{RestDelay: delay}, start: time.Now(), wake: -1, restored: make(chan struct{}), spaces: map[int]*space{}}
	p.cond.L = &p.mu
	p.ending, p.stop = context.WithCancel(t.Context())
	defer p.stop()
	hot, rest := &space{p: p, fd: 1, watched: true}, &space{p: p, fd: 2, watched: true, todo: []span{{addr: 1 << 20, size: HotSize}}}
	hot.todo = []span{{addr: 1 << 20, size: HotSize, hot: true}}
	p.spaces[1], p.spaces[2] = hot, rest
	if s, isHot := p.next(); s != hot || !isHot {
		t.Errorf("before CRIU is done: %v", s)
	}
	begin := time.Now()
	p.setReady()
	if s, isHot := p.next(); s != hot || !isHot {
		t.Errorf("what comes first is %v", s)
	}
	hot.todo = nil
	next := func(helper bool) *space {
		p.mu.Lock()
		defer p.mu.Unlock()
		s, _ := p.nextLocked(helper)
		return s
	}
	if s := next(true); s != rest {
		t.Errorf("an idle processor gets %v", s)
	}
	for next(false) == nil && time.Since(begin) < 10*time.Second {
		time.Sleep(time.Millisecond)
	}
	if took := time.Since(begin); took < delay || took >= 10*time.Second {
		t.Errorf("the rest comes after %v", took)
	}
}

// TestUnregistered: what CRIU has not yet put into its place is tried again, and
// stays where it is in the order.
func TestUnregistered(t *testing.T) {
	p := &Pager{wake: -1, restored: make(chan struct{}), spaces: map[int]*space{}}
	p.cond.L = &p.mu
	p.ending, p.stop = context.WithCancel(t.Context())
	defer p.stop()
	fd := newUffd(t)
	defer unix.Close(fd)
	data := make([]byte, HotSize)
	s := &space{p: p, fd: fd, watched: true, src: &content{size: HotSize}, todo: []span{
		{addr: 1 << 20, size: HotSize, hot: true}, {addr: 2 << 20, size: HotSize},
	}}
	w := window{from: s.src, data: data}
	p.spaces[fd] = s
	begin := time.Now()
	if err := p.piece(s, &w, chunkSize); !errors.Is(err, errNotNow) {
		t.Errorf("nothing is registered: %v", err)
	}
	if len(s.todo) != 2 || !s.todo[0].hot || s.todo[0].size != HotSize || len(s.claimed) > 0 {
		t.Errorf("left to do: %+v, claimed %+v", s.todo, s.claimed)
	}
	if !s.retry.After(begin) {
		t.Error("tried again at once")
	}
	for end := time.Now().Add(10 * time.Second); !p.hasNext(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never tried again")
		}
	}
	p.setReady()
	if err := p.piece(s, &w, chunkSize); err == nil || errors.Is(err, errNotNow) {
		t.Errorf("once CRIU is done: %v", err)
	}
}

// TestTouched: each range once, in the order of the first time, not too many, and
// none that is asked for later.
func TestTouched(t *testing.T) {
	p := &Pager{touchedOnce: map[Range]bool{}, start: time.Now()}
	for _, addr := range []uint64{5 * HotSize, 2*HotSize + pageSize, 5*HotSize + 3*pageSize, HotSize - pageSize} {
		p.touch(9, addr)
	}
	if want := []Range{{9, 5 * HotSize}, {9, 2 * HotSize}, {9, 0}}; !slices.Equal(p.Touched(), want) {
		t.Errorf("%v, want %v", p.Touched(), want)
	}
	for i := range uint64(MaxHot + 10) {
		p.touch(10, i*HotSize)
	}
	if n := len(p.Touched()); n != MaxHot {
		t.Errorf("%d ranges", n)
	}

	p = &Pager{touchedOnce: map[Range]bool{}, start: time.Now().Add(-time.Hour)}
	p.touch(9, 0)
	p.restoredAt.Store(1) // long ago, but the first fault after it is yet to come
	p.touch(9, HotSize)
	p.hotSince = p.hotSince.Add(-hotTime)
	p.touch(9, 2*HotSize)
	if want := []Range{{9, 0}, {9, HotSize}}; !slices.Equal(p.Touched(), want) {
		t.Errorf("with one that comes late: %v, want %v", p.Touched(), want)
	}
}

// TestHotRecord: what each of some containers in a row asks for becomes hot, and
// remains it; the record has a bound, and is written only if it changes.
func TestHotRecord(t *testing.T) {
	runtime := t.TempDir()
	name := HotFile(runtime, "version")
	if ranges, err := ReadHot(name); err != nil || len(ranges) != 0 {
		t.Fatalf("without a record: %v, %v", ranges, err)
	}
	add := func(ranges []Range, want []Range) {
		t.Helper()
		if err := AddHot(name, ranges); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadHot(name); err != nil || !slices.Equal(got, want) {
			t.Fatalf("%v, %v, want %v", got, err, want)
		}
	}
	first := []Range{{2, 3 * HotSize}, {1, 1 << 47}, {2, 0}}
	add(append(first, Range{7, 0}), nil) // once each
	for path, want := range map[string]os.FileMode{name: 0o600, filepath.Dir(name): os.ModeDir | 0o700} {
		if fi, err := os.Lstat(path); err != nil || fi.Mode() != want {
			t.Errorf("%s: %v, %v", path, fi.Mode(), err)
		}
	}
	add(append([]Range{{8, 0}}, first...), nil)                         // 7 is not in a row
	add(append(first, Range{7, 0}, Range{8, 0}), first)                 // 8 has been twice
	add([]Range{{2, 0}}, first)                                         // nobody has to ask for the others any more
	add([]Range{{8, 0}, {2, 0}, {1, 1 << 47}, {2, 3 * HotSize}}, first) // 8 begins again
	before, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	add([]Range{{8, 0}}, first)
	if after, err := os.Stat(name); err != nil || os.SameFile(before, after) {
		t.Errorf("it was not written: %v", err)
	}
	second := append(first, Range{8, 0})
	add([]Range{{8, 0}}, second)
	before, err = os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	add([]Range{{8, 0}, {2, 0}, {1, 5}, {0, HotSize}}, second)
	if after, err := os.Stat(name); err != nil || !os.SameFile(before, after) {
		t.Errorf("it was written again for nothing: %v", err)
	}

	many := slices.Clone(second)
	for i := uint64(0); len(many) < MaxHot; i++ {
		many = append(many, Range{3, math.MaxUint64 - HotSize + 1 - (i+1)*HotSize})
	}
	for i := range HotAfter {
		want := second
		if i == HotAfter-1 {
			want = many
		}
		add(append(slices.Clone(many), Range{4, 0}), want)
	}
	if entries, err := os.ReadDir(filepath.Dir(name)); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}

	for what, make := range map[string]func() error{
		"empty":        func() error { return os.WriteFile(name, nil, 0o600) },
		"another head": func() error { return os.WriteFile(name, []byte("stasis-hot 1\n1 0x0\n"), 0o600) },
		"not aligned":  func() error { return os.WriteFile(name, []byte(hotHead+"1 0x1000 1\n"), 0o600) },
		"too often":    func() error { return os.WriteFile(name, []byte(hotHead+"1 0x10000 4\n"), 0o600) },
		"too long":     func() error { return os.WriteFile(name, append([]byte(hotHead), make([]byte, hotLimit)...), 0o600) },
		"a directory":  func() error { return os.Mkdir(name, 0o700) },
		"a FIFO":       func() error { return syscall.Mkfifo(name, 0o600) },
	} {
		if err := os.RemoveAll(name); err != nil {
			t.Fatal(err)
		}
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if ranges, err := ReadHot(name); len(ranges) != 0 || !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("%s: %v, %v", what, ranges, err)
		}
		if what != "a directory" { // which nobody makes there
			for i := range HotAfter {
				add(first, first[:len(first)*(i/(HotAfter-1))])
			}
		}
	}
	other := filepath.Join(runtime, "other")
	err = errors.Join(os.RemoveAll(name), os.WriteFile(other, []byte(hotHead+"1 0x0 3\n"), 0o600), os.Symlink(other, name))
	if ranges, rerr := ReadHot(name); err != nil || len(ranges) != 0 || rerr == nil {
		t.Errorf("a link: %v, %v, %v", ranges, rerr, err)
	}
}

func TestSweepHot(t *testing.T) {
	runtime := t.TempDir()
	none := func() ([]checkpoint.ID, error) { return nil, errors.New("asked for nothing") }
	if err := SweepHot(runtime, none); err != nil {
		t.Error(err)
	}
	for _, id := range []checkpoint.ID{"a", "b", "c"} {
		if err := AddHot(HotFile(runtime, id), []Range{{1, 0}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(runtime, hotDir, ".new-1"), nil, 0o600); err != nil { // of a shim that died
		t.Fatal(err)
	}
	if err := SweepHot(runtime, none); err == nil {
		t.Error("no list of versions is no error")
	}
	if err := SweepHot(runtime, func() ([]checkpoint.ID, error) { return []checkpoint.ID{"b", "d"}, nil }); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(filepath.Join(runtime, hotDir)); err != nil || len(entries) != 1 || entries[0].Name() != "b" {
		t.Errorf("%v, %v", entries, err)
	}
}

// FuzzHot: what is read is within the bounds, and is what is written again.
func FuzzHot(f *testing.F) {
	f.Add(hotHead + "1 0x10000 1\n4294967295 0xfffffffffffe0000 3\n")
	f.Add(hotHead + "1 0x10000 2")
	f.Add(hotHead + "-1 0x0 1\n")
	f.Add(hotHead + "1 0x0\n")
	f.Add(hotHead + "1 0x0 0\n")
	f.Add(hotHead + "1 0x0 1\r")
	f.Add(hotHead + "1 0x0 1\r\n")
	f.Fuzz(func(t *testing.T, text string) {
		ranges, err := parseHot([]byte(text))
		if err != nil {
			if !errors.Is(err, checkpoint.ErrCorrupt) || ranges != nil {
				t.Errorf("%v, %v", ranges, err)
			}
			return
		}
		var b strings.Builder
		b.WriteString(hotHead)
		for _, r := range ranges {
			if !r.valid() || r.count < 1 || r.count > HotAfter {
				t.Errorf("range %+v", r)
			}
			fmt.Fprintf(&b, "%d %#x %d\n", r.PID, r.Addr, r.count)
		}
		if len(ranges) > MaxHot || strings.TrimSuffix(b.String(), "\n") != strings.TrimSuffix(text, "\n") {
			t.Errorf("%q was read as %q", text, b.String())
		}
	})
}
