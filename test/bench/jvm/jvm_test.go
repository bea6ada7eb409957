package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestPercentiles(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[99-i] = float64(i + 1) // not in order
	}
	for _, tc := range []struct {
		v                []float64
		p50, p99, median float64
	}{
		{nil, 0, 0, 0},
		{[]float64{7}, 7, 7, 7},
		{[]float64{3, 1, 2}, 2, 3, 2},
		{[]float64{4, 1, 3, 2}, 2, 4, 2.5},
		{hundred, 50, 99, 50.5},
	} {
		if p50, p99, m := percentile(tc.v, 50), percentile(tc.v, 99), median(tc.v); p50 != tc.p50 || p99 != tc.p99 || m != tc.median {
			t.Errorf("%v: %v, %v, %v, want %v, %v, %v", tc.v, p50, p99, m, tc.p50, tc.p99, tc.median)
		}
	}
	if hundred[0] != 100 {
		t.Error("the values were sorted in place")
	}
}

func TestNumbers(t *testing.T) {
	var got []int
	if err := numbers(&got)("1, 4,16"); err != nil || len(got) != 3 || got[2] != 16 {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "0", "-1", "x", "1,,2", "99999999999999999999"} {
		if numbers(&got)(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func example() *report {
	way := func(first ...float64) *wayReport {
		w := &wayReport{}
		for _, f := range first {
			w.add(timing{created: 5, started: 10, first: f, fill: 2e9,
				requests: []request{{0, 2 * time.Millisecond}, {2 * time.Second, 8 * time.Millisecond}}})
		}
		return w
	}
	s := &serviceReport{Name: "heap of 100 MB", TemplateBytes: 200 << 20, Source: latency{300, 1, 4}, Ways: map[string]*wayReport{
		wayCold: way(3000, 2900, 3100), wayRunc: way(500, 510, 520), wayLazy: way(120, 130, 140), wayClone: way(100, 90, 110), wayMapped: way(80, 70, 90)}}
	s.AtOnce = []atOnceReport{{Clones: 1, Way: wayClone, TotalMs: 100, PSSBytes: 100, ColdPSSBytes: 110, ColdMeasured: 1},
		{Clones: 4, Way: wayClone, TotalMs: 500, PSSBytes: 400, ColdPSSBytes: 440, ColdMeasured: 4, Merged: &mergedReport{PSSBytes: 100, Settled: true}}, {Clones: 16, Way: wayClone, Skipped: "no <memory>"},
		{Clones: 4, Way: wayMapped, TotalMs: 200, PSSBytes: 110, ColdPSSBytes: 440, ColdMeasured: 4}}
	s.Ways[wayMapped].Fill = nil
	return &report{Machine: machineFacts{CPUs: 2, Kernel: "6.1"}, Settings: settings{Runs: 3, Window: 10 * time.Second}, Floor: []float64{20, 30}, Services: []*serviceReport{s}}
}

// TestGoals: which targets a known report meets, and which not.
func TestGoals(t *testing.T) {
	met := map[string]bool{}
	for _, g := range example().goals() {
		met[g.name] = g.met
	}
	for name, want := range map[string]bool{
		"heap of 100 MB, stasis clone: first answer, 1.5 × (floor + 60 ms)":               true, // 100 of 127, for cold / 25 is 120
		"heap of 100 MB, runc restore / stasis clone":                                     true, // 5.1
		"heap of 100 MB, stasis clone: p99 in the first second / CRIU lazy-pages":         false,
		"heap of 100 MB, stasis clone: GB/s filled":                                       false,
		"heap of 100 MB, stasis clone: 4 at once / one":                                   false, // 5 of 4
		"heap of 100 MB, stasis clone: PSS of 4 / of cold copies":                         false, // 0.91
		"heap of 100 MB, stasis clone: PSS of 4, merged / of cold copies":                 true,  // 0.23
		"heap of 100 MB, stasis clone, mapped: first answer, 1.5 × (floor + 60 ms)":       true,
		"heap of 100 MB, runc restore / stasis clone, mapped":                             true,
		"heap of 100 MB, stasis clone, mapped: p99 in the first second / CRIU lazy-pages": false,
		"heap of 100 MB, stasis clone, mapped: 4 at once / one":                           true, // 2.5 of 4
		"heap of 100 MB, stasis clone, mapped: PSS of 4 / of cold copies":                 true, // 0.25
	} {
		if got, ok := met[name]; !ok || got != want {
			t.Errorf("%s: met %v, known %v, want met %v", name, got, ok, want)
		}
	}
	if len(met) != 12 {
		t.Errorf("%d goals: %v", len(met), met)
	}
	slow := example()
	slow.Services[0].Ways[wayCold].First = []float64{9000}
	if g := slow.goals()[0]; g.name != "heap of 100 MB, stasis clone: first answer, cold / 25" || g.want != "≤ 360" || !g.met {
		t.Errorf("a slow start: %+v", g)
	}
}

// TestReport: the text has the medians, the plot is well-formed and has a point
// for each value, the JSON has no value that JSON cannot have.
func TestReport(t *testing.T) {
	dir, r := t.TempDir(), example()
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	text, _ := os.ReadFile(filepath.Join(dir, "bench-jvm.txt"))
	for _, want := range []string{"3000 (2900-3100)", "100 (90.0-110)", "stasis clone, 16 at once: skipped, no <memory>", "stasis clone, 4 at once, pages merged: PSS 0 MB", "settled", "25.0 (20.0-30.0)", "2.00, 2.00", "2.00, 8.00",
		"never stopped: requests p50 1.00, p99 4.00, which is 2.00 of"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	b, _ := os.ReadFile(filepath.Join(dir, "bench-jvm.json"))
	var back report
	if err := json.Unmarshal(b, &back); err != nil || back.Services[0].Ways[wayClone].Second.Requests != 3 || back.Services[0].Ways[wayClone].Window.Requests != 6 {
		t.Errorf("%v: %s", err, b)
	}
	svg, _ := os.ReadFile(filepath.Join(dir, "bench-jvm.svg"))
	circles := 0
	for d := xml.NewDecoder(strings.NewReader(string(svg))); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v:\n%s", err, svg)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "circle" {
			circles++
		}
	}
	if want := 2 + 5*3 + 5*2; circles != want {
		t.Errorf("%d points, want %d", circles, want)
	}
}

// TestPlotOfNothing: no value, a value of 0 and a name with markup do no harm.
func TestPlotOfNothing(t *testing.T) {
	for _, rows := range [][]row{nil, {{label: "<&>", values: []float64{0}}}, {{label: "one", values: []float64{10}}}} {
		svg := plotRows(rows, "ms")
		if err := xml.Unmarshal([]byte(svg), new(struct{})); err != nil || strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") {
			t.Errorf("%v: %s", err, svg)
		}
	}
}

// TestPageCache: a file is in the page cache when it has been read, and not when
// it has been given up.
func TestPageCache(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	if err := os.WriteFile(name, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cacheIn(dir); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if pages, err := cached(f, 1<<20); err != nil || pages != (1<<20)/pageSize {
		t.Errorf("%d pages, %v", pages, err)
	}
	left, err := cacheOut(dir)
	if err != nil || left < 0 || left > 1 {
		t.Errorf("%v, %v", left, err)
	}
	if pages, err := cached(f, 1<<20); err != nil || math.Abs(float64(pages*pageSize)/(1<<20)-left) > 0.01 {
		t.Errorf("%d pages, but %v left: %v", pages, left, err)
	}
	if left, err := cacheOut(t.TempDir()); left != 0 || err != nil {
		t.Errorf("of nothing: %v, %v", left, err)
	}
}

// TestAnswers: a wrong answer is an error, at the first and at later requests;
// a service that does not answer yet is asked again.
func TestAnswers(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked++; asked == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "answer to "+r.URL.Path)
	}))
	defer server.Close()
	address := server.Listener.Addr().String()
	s := service{path: "/peek/%d"}
	if _, err := s.firstAnswer(t.Context(), address, map[string]string{"/peek/0": "answer to /peek/0"}); err != nil || asked != 2 {
		t.Errorf("asked %d times: %v", asked, err)
	}
	if _, err := s.firstAnswer(t.Context(), address, map[string]string{"/peek/0": "another"}); !errors.Is(err, errWrong) {
		t.Errorf("a wrong answer: %v", err)
	}
	if s.question(7) != "/peek/7" || floor().question(7) != "/hostname" {
		t.Error("questions")
	}
}

// ksmFiles makes a directory like the kernel's.
func ksmFiles(t *testing.T, values map[string]string) string {
	dir := t.TempDir()
	for name, v := range values {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(v+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func readKSM(t *testing.T, dir string) map[string]string {
	values := map[string]string{}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		b, rerr := os.ReadFile(filepath.Join(dir, e.Name()))
		err = errors.Join(err, rerr)
		values[e.Name()] = strings.TrimSpace(string(b))
	}
	if err != nil {
		t.Fatal(err)
	}
	return values
}

// TestMergeSettings: the machine's settings are put back as they were; where one
// cannot be read none is changed.
func TestMergeSettings(t *testing.T) {
	was := map[string]string{"run": "0", "pages_to_scan": "100", "sleep_millisecs": "20", "advisor_mode": "none [scan-time]", "full_scans": "7"}
	back := maps.Clone(was)
	back["advisor_mode"] = "scan-time" // how it is written
	dir := ksmFiles(t, was)
	putBack, err := mergeFast(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := readKSM(t, dir); got["run"] != "1" || got["advisor_mode"] != "none" || got["full_scans"] != "7" || got["pages_to_scan"] == "100" {
		t.Errorf("settings %v", got)
	}
	if err := putBack(); err != nil || !maps.Equal(readKSM(t, dir), back) {
		t.Errorf("put back: %v, %v", readKSM(t, dir), err)
	}

	delete(was, "advisor_mode") // an older kernel
	dir = ksmFiles(t, was)
	if putBack, err = mergeFast(dir); err != nil {
		t.Fatal(err)
	}
	if err := putBack(); err != nil || !maps.Equal(readKSM(t, dir), was) {
		t.Errorf("put back: %v, %v", readKSM(t, dir), err)
	}

	delete(was, "run")
	dir = ksmFiles(t, was)
	if _, err := mergeFast(dir); err == nil || !maps.Equal(readKSM(t, dir), was) {
		t.Errorf("without run: %v, %v", readKSM(t, dir), err)
	}
}

// TestWaitMerged: it ends when the count stays, but not before all was looked at.
func TestWaitMerged(t *testing.T) {
	dir := ksmFiles(t, map[string]string{"full_scans": "1", "pages_sharing": "5"})
	if settled, err := waitMerged(t.Context(), dir, 50*time.Millisecond, time.Millisecond); settled || err != nil {
		t.Errorf("nothing was scanned: %v, %v", settled, err)
	}
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for i := 1; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				name := filepath.Join(dir, "full_scans")
				os.WriteFile(name+".new", []byte(strconv.Itoa(i)), 0o600)
				os.Rename(name+".new", name)
			}
		}
	}()
	if settled, err := waitMerged(t.Context(), dir, 20*time.Second, time.Millisecond); !settled || err != nil {
		t.Errorf("settled %v, %v", settled, err)
	}
	if _, err := waitMerged(t.Context(), t.TempDir(), time.Second, time.Millisecond); err == nil {
		t.Error("no KSM is no error")
	}
}
