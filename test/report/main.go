// Command report reads `go test -json` streams, prints what failed, and ends
// with the plain line "N passed, N failed". It fails on a failed test, on a
// skipped one, and on a stream in which no test ran: a test that was not run
// has shown nothing.
//
// Usage: report FILE...
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

type event struct {
	Action, Package, Test, Output string
}

type result struct{ passed, failed, skipped, failedPackages int }

func main() {
	var total result
	bad := false
	for _, name := range os.Args[1:] {
		f, err := os.Open(name)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		r := read(f, os.Stdout)
		f.Close()
		fmt.Printf("%-32s %d passed, %d failed, %d skipped\n", name, r.passed, r.failed, r.skipped)
		if r.passed+r.failed == 0 {
			fmt.Printf("%s: no test ran\n", name)
			bad = true
		}
		total.passed += r.passed
		total.failed += r.failed + r.failedPackages
		total.skipped += r.skipped
	}
	if total.skipped > 0 {
		fmt.Printf("%d tests were skipped, which counts as a failure here\n", total.skipped)
	}
	fmt.Printf("%d passed, %d failed\n", total.passed, total.failed+total.skipped)
	if bad || total.failed+total.skipped > 0 {
		os.Exit(1)
	}
}

// read counts top-level tests and subtests and copies the output of those that
// failed or were skipped.
func read(r io.Reader, w io.Writer) (res result) {
	output := map[string]*strings.Builder{}
	failedIn := map[string]int{}
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Fprintln(w, sc.Text()) // a build error, for example
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "output":
			if output[key] == nil {
				output[key] = &strings.Builder{}
			}
			output[key].WriteString(e.Output)
			continue
		case "pass":
			if e.Test != "" {
				res.passed++
			}
		case "skip":
			if e.Test != "" {
				res.skipped++
				fmt.Fprintf(w, "--- SKIP %s\n%s", key, output[key])
			}
		case "fail":
			if e.Test != "" {
				res.failed++
				failedIn[e.Package]++
			} else if failedIn[e.Package] == 0 {
				res.failedPackages++ // did not build, or died outside of a test
			} else {
				continue
			}
			fmt.Fprintf(w, "--- FAIL %s\n%s", key, output[key])
		}
		delete(output, key)
	}
	return res
}
