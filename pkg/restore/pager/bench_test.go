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
// lazy-pages daemon, and with the pager, b.N times each, and reports medians: of
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
			p := tm.timed(b, kind, func(time.Time) {
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
			if p != nil {
				s := p.Stats()
				fill, rate = append(fill, s.Filled), append(rate, s.Rate()/1e9)
			}
		}
	}
	b.ReportMetric(0, "ns/op") // of all together it says nothing
	for _, kind := range kinds {
		b.ReportMetric(ms(median(first[kind])), kind+"-first-ms")
		b.ReportMetric(ms(median(all[kind])), kind+"-all-ms")
		b.ReportMetric(ms(median(half[kind])), kind+"-p50-ms")
		b.ReportMetric(ms(median(tail[kind])), kind+"-p99-ms")
	}
	b.ReportMetric(ms(median(fill)), "fill-ms")
	b.ReportMetric(median(rate), "fill-GB/s")
}

// timed restores, lets f measure from the time at which that was begun, and
// ends the process. The pager is for its statistics, nil where there was none.
func (tm *template) timed(b *testing.B, kind string, f func(begun time.Time)) *Pager {
	b.Helper()
	work := b.TempDir()
	cmd := tm.criuRestore(b, work, kind != "stock")
	var p *Pager
	var daemon *exec.Cmd
	if kind == "daemon" { // it is there before the clock starts, as it is waited for here
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
	}
	begun := time.Now()
	if kind == "pager" {
		var err error
		if p, err = Start(b.Context(), Options{ImageDir: tm.images, WorkDir: work}); err != nil {
			b.Fatal(err)
		}
	}
	run(b, work, cmd)
	f(begun)
	switch kind {
	case "daemon":
		if err := daemon.Wait(); err != nil {
			b.Fatal(err)
		}
	case "pager":
		waitFull(b, p)
		if err := p.Close(); err != nil {
			b.Fatal(err)
		}
	}
	tm.kill(b)
	return p
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median[T cmp.Ordered](v []T) T {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
