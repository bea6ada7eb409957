// Command jvm measures, inside a test node, how soon a warmed JVM answers its
// first request: started cold, restored by runc and CRIU, restored with CRIU's
// lazy-pages daemon, and cloned by stasis from a template.
//
// Cold starts and clones go the whole way of the CRI, from CreateContainer to
// the first right answer to an HTTP request that this process sends to the pod's
// address. The two others are `runc restore` of the template's own images in a
// pod of the node, from the start of runc on: containerd, the CRI, verification
// and the writable layer are not in their times, which favours them. The pod is
// there before the clock starts. The ways take turns within each run, and the
// answers of everything that began from the template are compared with those of
// its source.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settings are what a run may change.
type settings struct {
	Runs   int   `json:"runs"`
	Heaps  []int `json:"heapMB"`
	Clones []int `json:"clones"`
	Rate   int   `json:"requestsPerSecond"`
	// Window is in nanoseconds: how long requests are sent after the first answer.
	Window time.Duration `json:"windowNanos"`
	Tomcat bool          `json:"tomcat"`
	// Merge: clones offer their memory for merging, and the kernel is told to merge
	// while that of clones at once is measured.
	Merge bool `json:"merge"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench-jvm:", err)
		os.Exit(1)
	}
}

func run() error {
	s := settings{Heaps: []int{100, 1200}, Clones: []int{1, 4, 8, 16}}
	flag.IntVar(&s.Runs, "runs", 10, "how often each way is measured")
	flag.Func("heap", "heaps of the second service in MB, by commas (default 100,1200)", numbers(&s.Heaps))
	flag.Func("clones", "how many clones to start at once, by commas (default 1,4,8,16)", numbers(&s.Clones))
	flag.IntVar(&s.Rate, "rate", 100, "requests a second after the first answer")
	flag.DurationVar(&s.Window, "window", 10*time.Second, "how long to send them")
	flag.BoolVar(&s.Tomcat, "tomcat", true, "measure Tomcat too")
	flag.BoolVar(&s.Merge, "merge", false, "clones share pages; sets the machine's /sys/kernel/mm/ksm for some time")
	out := flag.String("o", ".", "directory for bench-jvm.json, .svg and .txt")
	flag.Parse()
	if flag.NArg() > 0 || s.Runs < 1 || s.Rate < 1 || s.Rate > 10000 || s.Window < time.Second {
		return fmt.Errorf("want at least one run, 1 to 10000 requests a second and a window of a second or more")
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 4*time.Hour)
	defer cancel()
	facts, err := machine()
	if err != nil {
		return err
	}
	n, err := connect()
	if err != nil {
		return err
	}
	defer n.conn.Close()
	r := &report{Settings: s, Machine: facts}
	if err := n.measure(ctx, r); err != nil {
		return err
	}
	return r.write(*out)
}

// numbers parses a list of positive numbers.
func numbers(to *[]int) func(string) error {
	return func(list string) error {
		*to = nil
		for word := range strings.SplitSeq(list, ",") {
			n, err := strconv.Atoi(strings.TrimSpace(word))
			if err != nil || n < 1 || n > 100000 {
				return fmt.Errorf("%q is no number from 1 to 100000", word)
			}
			*to = append(*to, n)
		}
		return nil
	}
}

func machine() (m machineFacts, err error) {
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	m.CPUs = runtime.NumCPU()
	m.MemoryBytes = meminfo("MemTotal")
	err = m.measure()
	return m, err
}

// meminfo is a line of /proc/meminfo in bytes, 0 where there is none.
func meminfo(name string) int64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	return kilobytes(string(b), name)
}

// kilobytes finds "NAME: N kB" and returns bytes.
func kilobytes(text, name string) int64 {
	for line := range strings.Lines(text) {
		var kb int64
		if n, _ := fmt.Sscanf(line, name+": %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	return 0
}

// measure fills the report.
func (n *node) measure(ctx context.Context, r *report) error {
	services := []service{}
	if r.Settings.Tomcat {
		services = append(services, tomcat())
	}
	for _, mb := range r.Settings.Heaps {
		services = append(services, warm(mb))
	}
	for _, s := range append(services, floor()) {
		if err := n.pull(ctx, s.image); err != nil {
			return err
		}
	}
	progress("the floor")
	for i := range r.Settings.Runs + 1 {
		t, err := n.cold(ctx, floor(), settings{})
		if err != nil {
			return fmt.Errorf("floor: %w", err)
		}
		if i > 0 { // the first one warms the caches
			r.Floor = append(r.Floor, t.first)
		}
	}
	for _, s := range services {
		sr, err := n.service(ctx, s, r.Settings)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		r.Services = append(r.Services, sr)
	}
	return nil
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s %s\n", time.Now().Format("15:04:05"), fmt.Sprintf(format, args...))
}

// service measures everything about one service.
func (n *node) service(ctx context.Context, s service, set settings) (*serviceReport, error) {
	progress("%s: warming the source", s.name)
	t, err := n.template(ctx, s, set)
	if err != nil {
		return nil, err
	}
	defer t.remove(context.WithoutCancel(ctx))
	r := &serviceReport{Name: s.name, TemplateBytes: t.bytes, Source: t.warm, Ways: map[string]*wayReport{}}
	for _, w := range ways {
		r.Ways[w] = &wayReport{}
	}
	measure := map[string]func(context.Context, *template, settings) (timing, error){
		wayCold: func(ctx context.Context, t *template, set settings) (timing, error) {
			return n.cold(ctx, t.service, set)
		},
		wayRunc: func(ctx context.Context, t *template, set settings) (timing, error) {
			return n.runc(ctx, t, set, false)
		},
		wayLazy: func(ctx context.Context, t *template, set settings) (timing, error) { return n.runc(ctx, t, set, true) },
	}
	for w, memory := range memories {
		measure[w] = func(ctx context.Context, t *template, set settings) (timing, error) {
			return n.clone(ctx, t, memory, set)
		}
	}
	for i := range set.Runs {
		for k := range ways {
			w := ways[(i+k)%len(ways)] // each way comes first, second, … as often
			progress("%s: run %d of %d: %s", s.name, i+1, set.Runs, w)
			if err := cacheIn(t.dir); err != nil {
				return nil, err
			}
			x, err := measure[w](ctx, t, set)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w, err)
			}
			r.Ways[w].add(x)
		}
		for k := range ways {
			w := ways[(i+k)%len(ways)]
			if w == wayCold {
				continue // reads no images of a checkpoint
			}
			left, err := cacheOut(t.dir)
			if err != nil {
				return nil, err
			}
			x, err := measure[w](ctx, t, settings{})
			if err != nil {
				return nil, fmt.Errorf("%s with a cold page cache: %w", w, err)
			}
			r.Ways[w].ColdCache = append(r.Ways[w].ColdCache, x.first)
			r.CacheLeft = max(r.CacheLeft, left)
		}
	}
	for _, w := range cloneWays {
		for _, count := range set.Clones {
			progress("%s: %s, %d at once", s.name, w, count)
			if err := cacheIn(t.dir); err != nil {
				return nil, err
			}
			c, err := n.atOnce(ctx, t, w, count, set.Merge && w == wayClone)
			if err != nil {
				return nil, fmt.Errorf("%s, %d at once: %w", w, count, err)
			}
			r.AtOnce = append(r.AtOnce, c)
		}
	}
	return r, n.coldCopies(ctx, t, r)
}

// write prints the report and leaves it in files.
func (r *report) write(dir string) error {
	text := r.text()
	fmt.Print(text)
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	for name, data := range map[string]string{"bench-jvm.json": string(b) + "\n", "bench-jvm.txt": text, "bench-jvm.svg": r.plot()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// cacheIn reads every file below the directory.
func cacheIn(dir string) error {
	return eachFile(dir, func(f *os.File, _ int64) error {
		_, err := io.Copy(io.Discard, f)
		return err
	})
}

// cacheOut asks the kernel to forget what it has cached of the files below the
// directory, of these alone, and returns the part that stays all the same.
func cacheOut(dir string) (left float64, err error) {
	var resident, total int64
	err = eachFile(dir, func(f *os.File, size int64) error {
		if err := f.Sync(); err != nil { // what is dirty stays
			return err
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return fmt.Errorf("fadvise %s: %w", f.Name(), err)
		}
		if size == 0 {
			return nil
		}
		pages, err := cached(f, size)
		resident, total = resident+pages, total+(size+pageSize-1)/pageSize
		return err
	})
	if total == 0 {
		return 0, err
	}
	return float64(resident) / float64(total), err
}

func eachFile(dir string, do func(f *os.File, size int64) error) error {
	return filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		return do(f, fi.Size())
	})
}
