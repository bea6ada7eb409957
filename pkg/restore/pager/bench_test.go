package pager

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

// BenchmarkRestore restores one dump in turn with CRIU alone, with CRIU's own
// lazy-pages daemon, and with the pager, b.N times each, and prints medians and extremes: of
// the times to the first answer and to one that takes all memory; and then, in
// restores of their own, of the latencies of requests of 32 pages in the first
// second after the first answer.
func BenchmarkRestore(b *testing.B) {
	for _, mb := range []int{100, 1000} {
		b.Run(fmt.Sprintf("%dMB", mb), func(b *testing.B) { benchmarkRestore(b, mb<<20) })
	}
}

var kinds = []string{"stock", "daemon", "pager"}

func benchmarkRestore(b *testing.B, bytes int) {
	tm := dump(b, bytes, 1)
	first, all := map[string][]time.Duration{}, map[string][]time.Duration{}
	half, tail := map[string][]time.Duration{}, map[string][]time.Duration{} // percentiles of each restore
	var fill []time.Duration
	var rate []float64
	for b.Loop() {
		for _, kind := range kinds {
			tm.timed(b, kind, func(start time.Time) {
				if err := ask(b, tm.addresses[0], "touch"); err != nil {
					b.Fatal(err)
				}
				first[kind] = append(first[kind], time.Since(start))
				if err := ask(b, tm.addresses[0], "verify"); err != nil {
					b.Fatal(err)
				}
				all[kind] = append(all[kind], time.Since(start))
			})
			stats := tm.timed(b, kind, func(time.Time) {
				c, err := connect(tm.addresses[0])
				if err != nil {
					b.Fatal(err)
				}
				defer c.Close()
				if err := c.ask("touch"); err != nil {
					b.Fatal(err)
				}
				var took []time.Duration
				for end := time.Now().Add(time.Second); time.Now().Before(end); {
					at := time.Now()
					if err := c.ask("some"); err != nil {
						b.Fatal(err)
					}
					took = append(took, time.Since(at))
				}
				slices.Sort(took)
				half[kind] = append(half[kind], took[len(took)/2])
				tail[kind] = append(tail[kind], took[len(took)*99/100])
			})
			if kind == "pager" {
				fill, rate = append(fill, stats.Filled), append(rate, stats.Rate()/1e9)
			}
		}
	}
	b.ReportMetric(0, "ns/op") // of all together it says nothing
	table := fmt.Sprintf("%6s %18s %18s %18s %18s", "ms", "first answer", "all memory", "request p50", "request p99")
	for _, kind := range kinds {
		table += fmt.Sprintf("\n%6s", kind)
		for _, v := range [][]time.Duration{first[kind], all[kind], half[kind], tail[kind]} {
			table += fmt.Sprintf(" %18s", spread(v))
		}
	}
	b.Logf("%s\nfilled in %s ms, %.1f GB/s", table, spread(fill), median(rate))
}

// timed restores, lets f measure from the time at which that was begun, and
// ends the process. The daemon and the pager are there before the clock starts.
func (tm *template) timed(b *testing.B, kind string, f func(begun time.Time)) (s Stats) {
	b.Helper()
	work := b.TempDir()
	cmd := tm.criuRestore(b, work, kind != "stock")
	var p *remote
	var daemon *exec.Cmd
	switch kind {
	case "daemon":
		daemon = exec.Command(criu.Binary, "lazy-pages", "-D", tm.images, "-W", work, "-o", "daemon.log")
		if err := daemon.Start(); err != nil {
			b.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(filepath.Join(work, "lazy-pages.socket")); err == nil {
				break
			} else if time.Now().After(end) {
				b.Fatal(err)
			}
		}
	case "pager":
		p = tm.separate(b, work, 0)
	}
	begun := time.Now()
	run(b, work, cmd)
	f(begun)
	switch kind {
	case "daemon":
		if err := daemon.Wait(); err != nil {
			b.Fatal(err)
		}
	case "pager":
		s = p.wait(b)
	}
	tm.kill(b)
	return s
}

// spread is the median, and the least and greatest value.
func spread(v []time.Duration) string {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.3g", float64(d.Microseconds())/1000) }
	return fmt.Sprintf("%s (%s-%s)", ms(median(v)), ms(slices.Min(v)), ms(slices.Max(v)))
}

func median[T cmp.Ordered](v []T) T {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
