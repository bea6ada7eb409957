package pager

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// model is memory page by page: where its content comes from.
type model map[uint64]int64

func modelOf(t *testing.T, spans []span) model {
	t.Helper()
	m := model{}
	for _, s := range spans {
		if s.size == 0 || s.size%pageSize != 0 {
			t.Fatalf("span %+v", s)
		}
		for addr := s.addr; addr < s.end(); addr += pageSize {
			if _, twice := m[addr]; twice {
				t.Fatalf("%#x twice in %+v", addr, spans)
			}
			m[addr] = s.part(addr, addr+pageSize).off
		}
	}
	return m
}

func byAddress(a, b span) int { return int(int64(a.addr) - int64(b.addr)) }

// TestEvents does what one task does to its memory, to spans and to a model.
func TestEvents(t *testing.T) {
	const pages = 64
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		s := &space{p: new(Pager), epoch: 1}
		for addr, off := uint64(pageSize), int64(0); addr < pages*pageSize; {
			c := span{addr: addr, size: (1 + r.Uint64N(8)) * pageSize, off: off}
			s.spans = append(s.spans, c)
			addr, off = c.end()+r.Uint64N(3)*pageSize, off+int64(c.size)
		}
		s.todo = slices.Clone(s.spans)
		want := modelOf(t, s.spans)
		for range 12 {
			from, size := r.Uint64N(pages)*pageSize, (1+r.Uint64N(16))*pageSize
			to := r.Uint64N(pages) * pageSize
			event := []byte{eventUnmap, eventRemove, eventRemap}[r.IntN(3)]
			do := func(m message) {
				if err := s.nextEpoch(); err != nil { // the kernel is done with what was before
					t.Fatal(err)
				}
				if _, err := s.event(m); err != nil {
					t.Fatal(err)
				}
			}
			if event != eventRemap {
				for addr := from; addr < from+size; addr += pageSize {
					delete(want, addr)
				}
				do(message{event, [3]uint64{from, from + size}})
			} else if to >= from+size || from >= to+size { // else the kernel refuses
				moved := model{}
				for addr := from; addr < from+size; addr += pageSize {
					if off, ok := want[addr]; ok {
						moved[addr+to-from] = off
					}
					delete(want, addr)
					delete(want, addr+to-from)
				}
				maps.Copy(want, moved)
				do(message{eventUnmap, [3]uint64{to, to + size}})
				do(message{eventRemap, [3]uint64{from, to, size}})
				do(message{eventUnmap, [3]uint64{from, from + size}})
			}
			for name, spans := range map[string][]span{"spans": s.spans, "todo": s.todo} {
				if got := modelOf(t, spans); !maps.Equal(got, want) {
					t.Fatalf("%s %+v instead of %+v", name, got, want)
				}
			}
			if !slices.IsSortedFunc(s.spans, byAddress) {
				t.Fatalf("not sorted: %+v", s.spans)
			}
			for addr := uint64(0); addr < 2*pages*pageSize; addr += pageSize {
				c, ok := find(s.spans, addr)
				if off, there := want[addr]; ok != there || ok && c.part(addr, addr+pageSize).off != off {
					t.Fatalf("find %#x: %+v, %v", addr, c, ok)
				}
				limit := addr + 5*pageSize
				first := addr + pageSize
				for _, there := want[first]; first < limit && !there; _, there = want[first] {
					first += pageSize
				}
				if got := next(s.spans, addr, limit); !ok && got != first {
					t.Fatalf("next of %#x is %#x, want %#x", addr, got, first)
				}
			}
		}
	}
}

// TestDisorder gives events of two threads in the order in which they happened,
// and in the other one.
func TestDisorder(t *testing.T) {
	const a, b, c, d = 0x100000, 0x200000, 0x300000, 0x400000
	const size = 2 * pageSize
	remap := func(from, to uint64) message { return message{eventRemap, [3]uint64{from, to, size}} }
	unmap := func(at uint64) message { return message{eventUnmap, [3]uint64{at, at + size}} }
	fork := message{event: eventFork}
	next := message{} // the kernel no longer refuses
	for _, tt := range []struct {
		name   string
		events []message
		want   string // where the content of a and c is; ? for perhaps
		child  string
		fails  bool
	}{
		{"nothing", nil, "a@a c@c", "", false},
		{"moved", []message{remap(a, b), unmap(a)}, "a@b c@c", "", false},
		{"unmapped", []message{unmap(a)}, "c@c", "", false},
		{"removed", []message{{eventRemove, [3]uint64{a, a + size}}}, "c@c", "", false},

		// One thread unmaps a, another moves c there.
		{"unmapped, then moved to", []message{unmap(a), remap(c, a), unmap(c)}, "c@a", "", false},
		{"moved to, then unmapped", []message{remap(c, a), unmap(a), unmap(c), next}, "c@a", "", false},
		// The same with b, which never had content; the second may be what it looks like.
		{"unmapped b, then moved to", []message{unmap(b), remap(c, b), unmap(c)}, "a@a c@b", "", false},
		{"moved to b, then unmapped", []message{remap(c, b), unmap(b), unmap(c)}, "a@a c@b?", "", false},
		{"moved to b, settled, then unmapped", []message{remap(c, b), next, unmap(b)}, "a@a", "", false},
		// One thread moves a away, another moves c there.
		{"moved away, then moved to", []message{remap(a, b), unmap(a), remap(c, a), unmap(c)}, "a@b c@a", "", false},
		{"moved away, its end comes last", []message{remap(a, b), remap(c, a), unmap(a), unmap(c)}, "a@b c@a?", "", false},
		{"moved to, then moved away", []message{remap(c, a), remap(a, b), unmap(a), unmap(c)}, "a@b c@a?", "", false},
		{"round in a circle", []message{remap(a, b), remap(c, a), remap(b, c)}, "a@c c@a", "", false},
		{"displaced for ever", []message{remap(c, a), next}, "", "", true},

		// A child has what the parent had, wherever its fork stands.
		{"fork, then moved", []message{fork, remap(a, b)}, "a@b c@c", "a@a c@c", false},
		{"moved, then fork", []message{remap(a, b), fork}, "a@b c@c", "a@a a@b c@c", false},
		{"unmapped, then fork", []message{unmap(a), fork}, "c@c", "a@a c@c", false},
		{"unmapped, settled, then fork", []message{unmap(a), next, fork}, "c@c", "c@c", false},
		{"moved, settled, then fork", []message{remap(a, b), next, fork}, "a@b c@c", "a@b c@c", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &space{p: new(Pager), epoch: 1, spans: []span{{addr: a, size: size, off: a}, {addr: c, size: size, off: c}}}
			s.todo = slices.Clone(s.spans)
			var child *space
			var err error
			for _, m := range tt.events {
				if m == next {
					err = s.nextEpoch()
				} else if c, eerr := s.event(m); eerr != nil {
					t.Fatal(eerr)
				} else if c != nil {
					child = c
				}
			}
			if (err != nil) != tt.fails {
				t.Fatalf("error %v", err)
			}
			if tt.fails {
				return
			}
			names := map[uint64]string{a: "a", b: "b", c: "c", d: "d"}
			show := func(s *space) string {
				if s == nil {
					return ""
				}
				var out []string
				for _, c := range s.spans {
					text := fmt.Sprintf("%s@%s", names[uint64(c.off)], names[c.addr])
					if c.doubtful {
						text += "?"
					}
					out = append(out, text)
				}
				slices.Sort(out)
				todo := slices.Clone(s.todo)
				sortSpans(todo)
				if !slices.Equal(todo, s.spans) {
					t.Errorf("todo %+v, spans %+v", todo, s.spans)
				}
				if len(s.displaced) > 0 {
					t.Errorf("displaced %+v", s.displaced)
				}
				return strings.Join(out, " ")
			}
			if got := show(s); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
			if got := show(child); got != tt.child {
				t.Errorf("child %q, want %q", got, tt.child)
			}
		})
	}
}

// TestAround: what is filled at a fault lies in one block of the file, and in the span.
func TestAround(t *testing.T) {
	const at = 1 << 40
	for _, tt := range []struct {
		off               int64 // of the span, which has 64 pages
		page, first, last uint64
	}{
		{0, 0, 0, 15},
		{0, 15, 0, 15},
		{0, 16, 16, 31},
		{0, 63, 48, 63},
		{3 * pageSize, 0, 0, 12},
		{3 * pageSize, 12, 0, 12},
		{3 * pageSize, 13, 13, 28},
		{3 * pageSize, 63, 61, 63},
	} {
		c := span{addr: at, size: 64 * pageSize, off: tt.off}
		want := c.part(at+tt.first*pageSize, at+(tt.last+1)*pageSize)
		if got := around(c, at+tt.page*pageSize); got != want {
			t.Errorf("%+v: %+v, want %+v", tt, got, want)
		}
	}
}
