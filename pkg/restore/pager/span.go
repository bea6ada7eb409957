package pager

import (
	"cmp"
	"slices"
	"sort"
)

// span is memory that is to have the content of the images from off on.
type span struct {
	addr, size   uint64
	off          int64
	epoch        uint32 // in which mremap moved it here; 0 for never
	doubtful     bool   // perhaps not there any more
	notInherited bool   // by a child of fork
	hot          bool   // to be filled first; in todo only
}

func (s span) end() uint64 { return s.addr + s.size }

// part is what of the span lies in [start, end), which it must touch.
func (s span) part(start, end uint64) span {
	start, end = max(start, s.addr), min(end, s.end())
	s.off += int64(start - s.addr)
	s.addr, s.size = start, end-start
	return s
}

// cut splits spans into those outside of [start, end), which keep their order,
// and those inside.
func cut(spans []span, start, end uint64) (outside, inside []span) {
	touches := func(s span) bool { return s.addr < end && s.end() > start }
	if !slices.ContainsFunc(spans, touches) {
		return spans, nil
	}
	outside = make([]span, 0, len(spans)+1)
	for _, s := range spans {
		if !touches(s) {
			outside = append(outside, s)
			continue
		}
		if s.addr < start {
			outside = append(outside, s.part(s.addr, start))
		}
		inside = append(inside, s.part(start, end))
		if s.end() > end {
			outside = append(outside, s.part(end, s.end()))
		}
	}
	return outside, inside
}

// without splits [start, end) into the parts that no span covers.
func without(start, end uint64, spans []span) []span {
	parts := []span{{addr: start, size: end - start}}
	for _, s := range spans {
		parts, _ = cut(parts, s.addr, s.end())
	}
	return parts
}

// find returns the span at an address, among spans sorted by address.
func find(spans []span, addr uint64) (span, bool) {
	i := sort.Search(len(spans), func(i int) bool { return spans[i].end() > addr })
	if i < len(spans) && spans[i].addr <= addr {
		return spans[i], true
	}
	return span{}, false
}

// next is the lowest address of a span above an address, or limit.
func next(spans []span, addr, limit uint64) uint64 {
	i := sort.Search(len(spans), func(i int) bool { return spans[i].addr > addr })
	if i < len(spans) {
		return min(spans[i].addr, limit)
	}
	return limit
}

func sortSpans(spans []span) {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.addr, b.addr) })
}
