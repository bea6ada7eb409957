package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// The ways, in the order of the letters.
const (
	wayCold   = "cold"
	wayRunc   = "runc restore"
	wayLazy   = "CRIU lazy-pages"
	wayClone  = "stasis clone"
	wayMapped = "stasis clone, mapped"
)

var ways = append([]string{wayCold, wayRunc, wayLazy}, cloneWays...)

var cloneWays = []string{wayClone, wayMapped}

// memories are the ways in which clones start, with the annotation that says so.
var memories = map[string]checkpoint.Memory{wayClone: checkpoint.MemoryLazy, wayMapped: checkpoint.MemoryMapped}

// phases are those of a restore, in their order.
var phases = []string{"claim", "prepare", "verify", "layers", "create", "pager", "tmpfs", "criu", "runc", "eager", "hook", "outside"}

// report is the JSON file. Times are in milliseconds, sizes in bytes.
type report struct {
	Machine  machineFacts     `json:"machine"`
	Settings settings         `json:"settings"`
	Floor    []float64        `json:"floorMs"`
	Services []*serviceReport `json:"services"`
}

type serviceReport struct {
	Name          string `json:"name"`
	TemplateBytes int64  `json:"templateBytes"`
	// Source is of the warmed service itself, which was never stopped: what no way can be
	// better than, but for chance.
	Source latency               `json:"source"`
	Ways   map[string]*wayReport `json:"ways"`
	// CacheLeft is the greatest part of the template's files that stayed in the
	// page cache when it was to be cold.
	CacheLeft float64        `json:"pageCacheLeft"`
	AtOnce    []atOnceReport `json:"atOnce"`
}

// wayReport has one element for each run, except for the requests, which are
// those of all runs.
type wayReport struct {
	Created   []float64 `json:"createdMs,omitempty"`
	Started   []float64 `json:"startedMs"`
	First     []float64 `json:"firstAnswerMs"`
	ColdCache []float64 `json:"firstAnswerColdPageCacheMs,omitempty"`
	Fill      []float64 `json:"fillBytesPerSecond,omitempty"`
	// Phases are the parts of a clone's start, see [event.Phase], by name; "outside"
	// is what they leave of it, of containerd, NRI and the daemon.
	Phases map[string][]float64 `json:"phasesMs,omitempty"`
	Second latency              `json:"firstSecond"`
	Window latency              `json:"window"`

	second, window []float64
}

// latency is of requests, from when each was due.
type latency struct {
	Requests int     `json:"requests"`
	P50      float64 `json:"p50Ms"`
	P99      float64 `json:"p99Ms"`
}

type atOnceReport struct {
	Clones   int       `json:"clones"`
	Way      string    `json:"way"`
	Skipped  string    `json:"skipped,omitempty"`
	TotalMs  float64   `json:"totalMs,omitempty"`
	EachMs   []float64 `json:"eachMs,omitempty"`
	PSSBytes int64     `json:"pssBytes,omitempty"`
	// ColdPSSBytes is of as many cold copies, by that of ColdMeasured copies.
	ColdPSSBytes int64 `json:"coldPSSBytes,omitempty"`
	ColdMeasured int   `json:"coldMeasured,omitempty"`
	// Merged is the memory after the kernel has merged equal pages, if it was to.
	Merged *mergedReport `json:"merged,omitempty"`
}

type mergedReport struct {
	PSSBytes int64   `json:"pssBytes"`
	KSMBytes int64   `json:"ksmBytes"` // of all clones: pages that are merged
	Ms       float64 `json:"ms"`       // that it took
	Settled  bool    `json:"settled"`  // or the time was over before
}

// add takes in one measurement.
func (w *wayReport) add(t timing) {
	if t.created > 0 {
		w.Created = append(w.Created, t.created)
	}
	w.Started, w.First = append(w.Started, t.started), append(w.First, t.first)
	if t.fill > 0 {
		w.Fill = append(w.Fill, t.fill)
	}
	if len(t.phases) > 0 {
		if w.Phases == nil {
			w.Phases = map[string][]float64{}
		}
		outside := t.started
		for _, p := range t.phases {
			took := float64(p.Micros) / 1e3
			w.Phases[p.Name] = append(w.Phases[p.Name], took)
			outside -= took
		}
		w.Phases["outside"] = append(w.Phases["outside"], outside)
	}
	for _, r := range t.requests {
		if r.due < time.Second {
			w.second = append(w.second, ms(r.took))
		}
		w.window = append(w.window, ms(r.took))
	}
	w.Second, w.Window = newLatency(w.second), newLatency(w.window)
}

func newLatency(v []float64) latency {
	return latency{len(v), percentile(v, 50), percentile(v, 99)}
}

// percentile is the smallest value that p percent of the values do not exceed;
// NaN has no place in JSON, so that of none is 0.
func percentile(v []float64, p float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return s[max(0, int(math.Ceil(p/100*float64(len(s))))-1)]
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// spread is "median (least-greatest)".
func spread(v []float64) string {
	if len(v) == 0 {
		return "-"
	}
	return fmt.Sprintf("%s (%s-%s)", short(median(v)), short(slices.Min(v)), short(slices.Max(v)))
}

// short is a number with three digits that count, or as an integer.
func short(x float64) string {
	switch {
	case x >= 100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func megabytes(b int64) string { return fmt.Sprint((b + 1<<19) >> 20) }

// text is the report for people.
func (r *report) text() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "%d processors, %s MB, kernel %s; %d runs, median (least-greatest), times in ms\n",
		r.Machine.CPUs, megabytes(r.Machine.MemoryBytes), r.Machine.Kernel, r.Settings.Runs)
	fmt.Fprintf(w, "a page at its first touch %s µs, a copy into such memory %s GB/s, a process (/bin/true) %s ms\n",
		short(r.Machine.TouchMicros), short(r.Machine.CopyRate/1e9), short(r.Machine.ProcessMs))
	fmt.Fprintf(w, "floor, an empty container through the CRI: first answer %s\n", spread(r.Floor))
	for _, s := range r.Services {
		fmt.Fprintf(w, "\n%s, template of %s MB\n", s.Name, megabytes(s.TemplateBytes))
		fmt.Fprintf(w, "\tfirst answer\tof it until created\tuntil started\twith a cold page cache\tfilled at GB/s\tp50, p99 in the first second\tp50, p99 in %v\n", r.Settings.Window)
		for _, way := range ways {
			x := s.Ways[way]
			gb := make([]float64, len(x.Fill))
			for i, f := range x.Fill {
				gb[i] = f / 1e9
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s, %s\t%s, %s\n", way, spread(x.First), spread(x.Created), spread(x.Started), spread(x.ColdCache), spread(gb),
				short(x.Second.P50), short(x.Second.P99), short(x.Window.P50), short(x.Window.P99))
		}
		if lazy := s.Ways[wayLazy].Second.P99; s.Source.Requests > 0 && lazy > 0 {
			fmt.Fprintf(w, "the warmed source, never stopped: requests p50 %s, p99 %s, which is %s of CRIU lazy-pages' p99 in the first second\n",
				short(s.Source.P50), short(s.Source.P99), short(s.Source.P99/lazy))
		}
		for _, way := range cloneWays {
			if p := s.Ways[way].Phases; len(p) > 0 {
				var parts []string
				for _, name := range phases {
					if v := p[name]; len(v) > 0 {
						parts = append(parts, name+" "+short(median(v)))
					}
				}
				fmt.Fprintf(w, "start of a %s: %s\n", way, strings.Join(parts, ", "))
			}
		}
		for _, way := range cloneWays {
			if clone := median(s.Ways[way].First); clone > 0 {
				fmt.Fprintf(w, "a %s answers %s times as soon as a cold start, %s times as soon as runc restore\n",
					way, short(median(s.Ways[wayCold].First)/clone), short(median(s.Ways[wayRunc].First)/clone))
			}
		}
		if s.CacheLeft > 0.01 {
			fmt.Fprintf(w, "the page cache was not cold: %.0f %% of the template stayed in it\n", 100*s.CacheLeft)
		}
		for _, a := range s.AtOnce {
			if a.Skipped != "" {
				fmt.Fprintf(w, "%s, %d at once: skipped, %s\n", a.Way, a.Clones, a.Skipped)
				continue
			}
			how := "measured"
			if a.ColdMeasured != a.Clones {
				how = fmt.Sprintf("by that of %d", a.ColdMeasured)
			}
			fmt.Fprintf(w, "%s, %d at once: all answer after %s, each after %s; PSS %s MB, of cold copies %s MB (%s)\n",
				a.Way, a.Clones, short(a.TotalMs), spread(a.EachMs), megabytes(a.PSSBytes), megabytes(a.ColdPSSBytes), how)
			if m := a.Merged; m != nil {
				until := "settled"
				if !m.Settled {
					until = "given up"
				}
				fmt.Fprintf(w, "%s, %d at once, pages merged: PSS %s MB; %s MB are merged pages, each counted in each clone; %s after %s s\n",
					a.Way, a.Clones, megabytes(m.PSSBytes), megabytes(m.KSMBytes), until, short(m.Ms/1000))
			}
		}
	}
	fmt.Fprintf(w, "\ngoal\twanted\tmeasured\tverdict\n")
	for _, g := range r.goals() {
		verdict := "not met"
		if g.met {
			verdict = "met"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", g.name, g.want, g.got, verdict)
	}
	w.Flush()
	fmt.Fprintln(&b, "\ncold and clone: from CreateContainer to the first right answer; runc restore and CRIU lazy-pages: from the start of runc,"+
		"\nwithout containerd, CRI and verification, the daemon listening before. Requests: from when each was due, of all runs.")
	return b.String()
}

// goal is a target and what became of it.
type goal struct {
	name, want, got string
	met             bool
}

// goals compares medians with the targets.
func (r *report) goals() (gs []goal) {
	ratio := func(name string, a, b, least float64) {
		if a > 0 && b > 0 {
			gs = append(gs, goal{name, fmt.Sprintf("≥ %.3g", least), short(a / b), a/b >= least})
		}
	}
	atMost := func(name string, got, most float64) {
		if got > 0 {
			gs = append(gs, goal{name, "≤ " + short(most), short(got), got <= most})
		}
	}
	floor := median(r.Floor)
	var heaps []*serviceReport
	for _, s := range r.Services {
		cold, least := median(s.Ways[wayCold].First), 20.0
		if strings.HasPrefix(s.Name, "heap") {
			heaps, least = append(heaps, s), 25
		}
		// What the floor forbids is not asked for.
		most, why := cold/least, fmt.Sprintf("cold / %.0f", least)
		if alone := 1.5 * (floor + 60); most < alone {
			most, why = alone, "1.5 × (floor + 60 ms)"
		}
		for _, way := range cloneWays {
			of := s.Name + ", " + way + ": "
			clone := median(s.Ways[way].First)
			atMost(of+"first answer, "+why, clone, most)
			atMost(of+"p99 in the first second / CRIU lazy-pages", s.Ways[way].Second.P99/max(s.Ways[wayLazy].Second.P99, 1e-9), 0.5)
			if fill := median(s.Ways[way].Fill); fill > 0 {
				ratio(of+"GB/s filled", fill/1e9, 1, 4)
			}
			for _, a := range s.AtOnce {
				if a.Way != way || a.Skipped != "" || a.Clones == 1 {
					continue
				}
				atMost(fmt.Sprintf("%s%d at once / one", of, a.Clones), a.TotalMs/max(clone, 1e-9), 2*float64(a.Clones)/float64(max(r.Machine.CPUs, 1)))
				if a.ColdPSSBytes > 0 {
					atMost(fmt.Sprintf("%sPSS of %d / of cold copies", of, a.Clones), float64(a.PSSBytes)/float64(a.ColdPSSBytes), 0.35)
					if a.Merged != nil {
						atMost(fmt.Sprintf("%sPSS of %d, merged / of cold copies", of, a.Clones), float64(a.Merged.PSSBytes)/float64(a.ColdPSSBytes), 0.35)
					}
				}
			}
		}
	}
	for _, way := range cloneWays {
		if len(heaps) > 0 {
			large := heaps[len(heaps)-1]
			ratio(fmt.Sprintf("%s, runc restore / %s", large.Name, way), median(large.Ways[wayRunc].First), median(large.Ways[way].First), 4)
		}
		if len(heaps) > 1 {
			small, large := heaps[0], heaps[len(heaps)-1]
			atMost(fmt.Sprintf("%s, %s / %s", way, large.Name, small.Name), median(large.Ways[way].First)/max(median(small.Ways[way].First), 1e-9), 1.3)
		}
	}
	return gs
}
