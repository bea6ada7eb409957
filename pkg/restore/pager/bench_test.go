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
// lazy-pages daemon, and with the pager, b.N times each, and prints the medians
// of the times to the first answer, and to the answer that takes all memory.
func BenchmarkRestore(b *testing.B) {
	for _, mb := range []int{100, 1000} {
		b.Run(fmt.Sprintf("%dMB", mb), func(b *testing.B) { benchmarkRestore(b, mb<<20) })
	}
}

func benchmarkRestore(b *testing.B, bytes int) {
	tm := dump(b, bytes, 1)
	kinds := []string{"stock", "daemon", "pager"}
	first, all := map[string][]time.Duration{}, map[string][]time.Duration{}
	var fill, restored []time.Duration
	var rate []float64
	var faults []uint64
	for b.Loop() {
		for _, kind := range kinds {
			work := b.TempDir()
			cmd := tm.criuRestore(b, work, kind != "stock")
			var p *Pager
			var daemon *exec.Cmd
			if kind == "daemon" { // ready before the clock starts, as it is waited for
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
			start := time.Now()
			if kind == "pager" {
				var err error
				if p, err = Start(b.Context(), Options{ImageDir: tm.images, WorkDir: work}); err != nil {
					b.Fatal(err)
				}
			}
			run(b, work, cmd)
			if err := ask(b, tm.addresses[0], "touch"); err != nil {
				b.Fatal(err)
			}
			first[kind] = append(first[kind], time.Since(start))
			if err := ask(b, tm.addresses[0], "verify"); err != nil {
				b.Fatal(err)
			}
			all[kind] = append(all[kind], time.Since(start))
			switch kind {
			case "daemon":
				if err := daemon.Wait(); err != nil {
					b.Fatal(err)
				}
			case "pager":
				waitFull(b, p)
				s := p.Stats()
				restored = append(restored, s.Restored)
				fill, rate, faults = append(fill, s.Filled), append(rate, s.Rate()/1e9), append(faults, s.Faults)
				if err := p.Close(); err != nil {
					b.Fatal(err)
				}
			}
			tm.kill(b)
		}
	}
	b.ReportMetric(0, "ns/op") // of all three together it says nothing
	for _, kind := range kinds {
		b.ReportMetric(ms(median(first[kind])), kind+"-first-ms")
		b.ReportMetric(ms(median(all[kind])), kind+"-all-ms")
	}
	b.ReportMetric(ms(median(restored)), "restored-ms")
	b.ReportMetric(ms(median(fill)), "fill-ms")
	b.ReportMetric(median(rate), "fill-GB/s")
	b.ReportMetric(float64(median(faults)), "faults")
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median[T cmp.Ordered](v []T) T {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
