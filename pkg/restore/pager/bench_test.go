package pager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

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

// BenchmarkFill fills memory of this process that nobody waits for, from a file
// in the page cache, by one thread and by two: what the pager reaches when nothing
// else runs. Each block of the file is checked, as a template's are.
func BenchmarkFill(b *testing.B) {
	const size = 512 << 20
	src := noise(b, size)
	for _, threads := range []int{1, 2} {
		b.Run(fmt.Sprintf("threads=%d", threads), func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				b.StopTimer()
				p := &Pager{ready: true, restored: make(chan struct{})}
				close(p.restored)
				s, mem := missing(b, p, src)
				s.todo = slices.Clone(s.spans)
				b.StartTimer()
				var wg sync.WaitGroup
				for range threads {
					wg.Go(func() {
						var w window
						for s.unclaimed() {
							if err := s.bulk(&w, chunkSize); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				if got := p.copied.Load(); got != size {
					b.Errorf("%d bytes were copied", got)
				}
				if err := errors.Join(unix.Close(s.fd), unix.Munmap(mem)); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkMap reads a byte of each page of such a file that is mapped privately, as
// mapped memory is: how fast all of it is there for a task, where a pager has to fill it.
func BenchmarkMap(b *testing.B) {
	const size = 512 << 20
	src := noise(b, size)
	b.SetBytes(size)
	sum := byte(0)
	for b.Loop() {
		mem, err := unix.Mmap(int(src.file.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		if err != nil {
			b.Fatal(err)
		}
		for at := 0; at < size; at += os.Getpagesize() {
			sum ^= mem[at]
		}
		if err := unix.Munmap(mem); err != nil {
			b.Fatal(err)
		}
	}
	runtime.KeepAlive(sum)
}

// BenchmarkFault touches a page of each block of such memory, in random order, and
// has each answered by the pager's server: what a task waits for a page when
// nothing else runs.
func BenchmarkFault(b *testing.B) {
	const size = 512 << 20
	p := &Pager{start: time.Now(), spaces: map[int]*space{}, touchedOnce: map[Range]bool{}, restored: make(chan struct{})}
	close(p.restored)
	p.cond.L = &p.mu
	var err error
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		b.Fatal(err)
	}
	if p.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		b.Fatal(err)
	}
	if err := p.watch(p.wake); err != nil {
		b.Fatal(err)
	}
	p.ending, p.stop = context.WithCancel(b.Context())
	s, mem := missing(b, p, noise(b, size))
	if err := p.add(s); err != nil {
		b.Fatal(err)
	}
	p.running.Go(p.serve)
	order := rand.Perm(size / HotSize)
	runtime.LockOSThread() // a task has threads of its own
	defer runtime.UnlockOSThread()
	sum, n := byte(0), 0
	for b.Loop() {
		if n == len(order) {
			b.StopTimer()
			if err := unix.Madvise(mem, unix.MADV_DONTNEED); err != nil {
				b.Fatal(err)
			}
			n = 0
			b.StartTimer()
		}
		sum ^= mem[order[n]*HotSize+rand.IntN(HotSize)]
		n++
	}
	b.StopTimer()
	b.ReportMetric(float64(p.faults.Load())/float64(b.N), "faults/op")
	p.end(errors.New("enough"))
	p.running.Wait()
	if err := errors.Join(p.release(), unix.Munmap(mem)); err != nil {
		b.Fatal(err)
	}
	runtime.KeepAlive(sum)
}

// noise is a file of random bytes in the page cache, with the checksums of its blocks.
func noise(b *testing.B, size int) *content {
	b.Helper()
	dir := b.TempDir()
	_, sums := pagesFile(b, dir, size)
	f, err := os.Open(filepath.Join(dir, "pages-1.img"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	return &content{f, sums.SizeBytes, sums.Blocks}
}

// missing is memory of this process of which all pages are missing, with all of
// the content.
func missing(b *testing.B, p *Pager, src *content) (*space, []byte) {
	b.Helper()
	mem, err := unix.Mmap(-1, 0, int(src.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	start := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
	fd := newUffd(b)
	register := [4]uint64{start, uint64(src.size), 1}
	if errno := ioctl(fd, 0xc020aa00, unsafe.Pointer(&register)); errno != 0 {
		b.Fatal(errno)
	}
	return &space{p: p, fd: fd, src: src, spans: []span{{addr: start, size: uint64(src.size)}}}, mem
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
