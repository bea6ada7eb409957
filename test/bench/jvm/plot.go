package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// row is a line of the plot: a point for each value, and a bar at the median.
type row struct {
	label, color string
	values       []float64 // above 0
	mark         string    // text beside the median
}

var colors = map[string]string{wayCold: "#555", wayRunc: "#c60", wayLazy: "#07a", wayClone: "#080", wayMapped: "#a0a"}

// plot is the first answers of all services and ways as an SVG image with a
// logarithmic axis. It is one kind of picture with points and lines: text that
// is written directly, and no library to keep for it.
func (r *report) plot() string {
	rows := []row{{label: "floor (empty container)", color: "#999", values: r.Floor}}
	for _, s := range r.Services {
		rows = append(rows, row{label: s.Name})
		for _, w := range ways {
			x := s.Ways[w]
			rows = append(rows, row{label: w, color: colors[w], values: x.First})
			if len(x.ColdCache) > 0 {
				rows = append(rows, row{label: w + ", cold page cache", color: colors[w], values: x.ColdCache})
			}
		}
		for _, w := range ways {
			if l := s.Ways[w].Second; l.Requests > 0 {
				rows = append(rows, row{label: w + ": requests, p50 and p99, first second", color: colors[w], values: []float64{l.P50, l.P99}})
			}
		}
	}
	return plotRows(rows, "milliseconds")
}

// plotRows draws rows below each other; one without values is a heading.
func plotRows(rows []row, unit string) string {
	const left, width, line, top = 330.0, 560.0, 20.0, 30.0
	low, high := math.Inf(1), math.Inf(-1)
	for _, r := range rows {
		for _, v := range r.values {
			if v > 0 {
				low, high = min(low, v), max(high, v)
			}
		}
	}
	if low > high {
		low, high = 1, 10
	}
	from, to := math.Floor(math.Log10(low)), math.Ceil(math.Log10(high))
	if from == to {
		to++
	}
	x := func(v float64) float64 { return left + width*(math.Log10(v)-from)/(to-from) }
	height := top + line*float64(len(rows)) + 40
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="12">`+"\n", left+width+90, height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	bottom := height - 35
	for e := from; e <= to; e++ {
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%.0f" x2="%.1f" y2="%.0f" stroke="#ddd"/><text x="%.1f" y="%.0f" text-anchor="middle">%g</text>`+"\n",
			x(math.Pow(10, e)), top-10, x(math.Pow(10, e)), bottom, x(math.Pow(10, e)), bottom+15, math.Pow(10, e))
	}
	fmt.Fprintf(&b, `<text x="%.1f" y="%.0f" text-anchor="middle">%s</text>`+"\n", left+width/2, bottom+30, html.EscapeString(unit))
	for i, r := range rows {
		y := top + line*float64(i)
		if len(r.values) == 0 {
			fmt.Fprintf(&b, `<text x="10" y="%.1f" font-weight="bold">%s</text>`+"\n", y+4, html.EscapeString(r.label))
			continue
		}
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="end">%s</text>`+"\n", left-10, y+4, html.EscapeString(r.label))
		values := slices.DeleteFunc(slices.Clone(r.values), func(v float64) bool { return v <= 0 })
		for _, v := range values {
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s" fill-opacity="0.4"/>`+"\n", x(v), y, r.color)
		}
		if len(values) > 0 {
			m := median(values)
			if len(values) == 2 { // p50 and p99: a line from one to the other
				fmt.Fprintf(&b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`+"\n", x(values[0]), y, x(values[1]), y, r.color)
			}
			fmt.Fprintf(&b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="2"/>`+"\n", x(m), y-7, x(m), y+7, r.color)
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" fill="%s">%s</text>`+"\n", left+width+10, y+4, r.color, short(m))
		}
	}
	b.WriteString("</svg>\n")
	return b.String()
}
