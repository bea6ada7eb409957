package pager

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// model is memory page by page: where its content comes from.
type model map[uint64]span

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
			m[addr] = s.part(addr, addr+pageSize)
		}
	}
	return m
}

// TestSpans does what tasks do to their memory, to spans and to a model.
func TestSpans(t *testing.T) {
	const pages = 64
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var spans []span
		for addr, off := uint64(pageSize), int64(0); addr < pages*pageSize; {
			s := span{addr: addr, size: (1 + r.Uint64N(8)) * pageSize, off: off}
			spans = append(spans, s)
			addr, off = s.end()+r.Uint64N(3)*pageSize, off+int64(s.size)
		}
		want := modelOf(t, spans)
		for range 12 {
			from, size := r.Uint64N(pages)*pageSize, (1+r.Uint64N(16))*pageSize
			if r.IntN(2) == 0 {
				outside, inside := cut(spans, from, from+size)
				in := modelOf(t, inside)
				for addr := from; addr < from+size; addr += pageSize {
					if s, ok := want[addr]; ok && in[addr] != s {
						t.Fatalf("cut: inside at %#x is %+v, want %+v", addr, in[addr], s)
					}
					delete(in, addr)
					delete(want, addr)
				}
				if len(in) > 0 {
					t.Fatalf("cut: inside are %+v", in)
				}
				spans = outside
			} else {
				to := r.Uint64N(pages) * pageSize
				if to < from+size && from < to+size { // the kernel refuses that
					continue
				}
				moved := model{}
				for addr := from; addr < from+size; addr += pageSize {
					if s, ok := want[addr]; ok {
						s.addr, s.moved = s.addr+to-from, true
						moved[s.addr] = s
					}
					delete(want, addr)
					delete(want, addr+to-from)
				}
				maps.Copy(want, moved)
				spans = move(spans, from, to, size)
				sortSpans(spans)
			}
			if got := modelOf(t, spans); !maps.Equal(got, want) {
				t.Fatalf("%+v instead of %+v", got, want)
			}
			if !slices.IsSortedFunc(spans, func(a, b span) int { return int(int64(a.addr) - int64(b.addr)) }) {
				t.Fatalf("not sorted: %+v", spans)
			}
			for addr := uint64(0); addr < 2*pages*pageSize; addr += pageSize {
				s, ok := find(spans, addr)
				if w, there := want[addr]; ok != there || ok && s.part(addr, addr+pageSize) != w {
					t.Fatalf("find %#x: %+v, %v", addr, s, ok)
				}
				limit := addr + 5*pageSize
				for n := addr + pageSize; !ok && n <= next(spans, addr, limit); n += pageSize {
					if _, there := want[n]; there != (n == next(spans, addr, limit) && n < limit) && n < limit {
						t.Fatalf("next of %#x is %#x", addr, next(spans, addr, limit))
					}
				}
			}
		}
	}
}
