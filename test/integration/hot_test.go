package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/restore/pager"
)

const runtimeDir = "/run/stasis"

var fullLine = regexp.MustCompile(`(faults|hot_ranges)=(\d+)`)

// shimLines are the lines with a text that the container's shim has logged.
func (c *ctr) shimLines(text string) (lines []string) {
	c.p.n.t.Helper()
	b, err := os.ReadFile("/var/log/containerd.log")
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, text) && strings.Contains(line, "container_id="+c.id) {
			lines = append(lines, line)
		}
	}
	return lines
}

// waitFull waits for the shim's line that the container's memory is full, and
// returns what it tells.
func (c *ctr) waitFull() (faults, hotRanges int) {
	c.p.n.t.Helper()
	eventually(c.p.n.t, "the shim's line that memory is full", func() error {
		lines := c.shimLines(`msg="memory is full"`)
		if len(lines) == 0 {
			return fmt.Errorf("none of container %s", c.id)
		}
		values := map[string]int{}
		for _, m := range fullLine.FindAllStringSubmatch(lines[0], -1) {
			values[m[1]], _ = strconv.Atoi(m[2])
		}
		faults, hotRanges = values["faults"], values["hot_ranges"]
		return nil
	})
	return faults, hotRanges
}

// TestHotMemory: what a clone asks for before its memory is full is recorded and
// filled first in the next one, until the version is gone. A record that is none
// does no harm, and what is restored only once has none.
func TestHotMemory(t *testing.T) {
	n, name, key := newNode(t), uniqueKey(t), uniqueKey(t)
	removeTemplate(t, name)
	command := patterned(200, 1, false, "marker-"+key)
	src := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"}).start("c", "python", command)
	before := src.waitRounds(1)
	version := src.makeTemplate(t, name)
	src.p.remove()
	file := pager.HotFile(runtimeDir, checkpoint.ID(version))
	clone := func() (hotRanges int) {
		t.Helper()
		c := clonePod(n, name).start("c", "python", command)
		c.wantLazy()
		c.wantGoesOn(before)
		faults, hotRanges := c.waitFull()
		c.p.remove()
		t.Logf("%d faults, %d hot ranges", faults, hotRanges)
		return hotRanges
	}
	// add starts a clone, which has what was hot before, and waits until the record
	// has been written.
	add := func(hot int) {
		t.Helper()
		before, _ := os.Stat(file)
		if n := clone(); n != hot {
			t.Errorf("%d hot ranges, want %d", n, hot)
		}
		eventually(t, "a record", func() error { // it is written after the line
			if fi, err := os.Stat(file); err != nil || before != nil && os.SameFile(before, fi) {
				return fmt.Errorf("%s: the same as before, %v", file, err)
			}
			return nil
		})
	}
	hot := func() []pager.Range {
		t.Helper()
		ranges, err := pager.ReadHot(file)
		if err != nil {
			t.Fatal(err)
		}
		return ranges
	}

	for i := range pager.HotAfter {
		if n := len(hot()); n != 0 {
			t.Errorf("%d ranges are hot after %d clones", n, i)
		}
		add(0)
	}
	first := hot()
	if len(first) == 0 {
		t.Fatalf("nothing is hot after %d clones", pager.HotAfter)
	}
	if n := clone(); n != len(first) {
		t.Errorf("%d hot ranges, %d are recorded", n, len(first))
	}
	if second := hot(); len(second) < len(first) || !slices.Equal(second[:len(first)], first) {
		t.Errorf("recorded: %v, before %v", second, first)
	}
	for path, want := range map[string]os.FileMode{file: 0o600, filepath.Dir(file): os.ModeDir | 0o700} {
		if fi, err := os.Lstat(path); err != nil || fi.Mode() != want {
			t.Errorf("%s: %v, %v", path, fi, err)
		}
	}

	if err := os.WriteFile(file, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	add(0) // of nonsense nothing is hot
	hot()  // and it is a record again

	there, err := os.ReadDir(filepath.Dir(file)) // with those of other tests that are yet to be swept
	if err != nil {
		t.Fatal(err)
	}
	dumped(t, n, key, command, 1)
	c := n.runPod(key, annotate(key)).start("c", "python", command)
	c.wantLazy()
	c.waitFull()
	wantNoRecord(t, key)
	c.p.remove()
	if entries, err := os.ReadDir(filepath.Dir(file)); err != nil || len(entries) != len(there) {
		t.Errorf("records %v, before %v, %v", entries, there, err)
	}

	run(t, "stasis", "template", "rm", "default/"+name)
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	stopDaemon(t)
	run(t, "/src/test/node/up", "stasisd") // it tidies up when it starts
	eventually(t, "end of the record", func() error {
		if _, err := os.Lstat(file); !os.IsNotExist(err) {
			return fmt.Errorf("it is there: %v", err)
		}
		return nil
	})
	wantNoneLeft(t, "marker-"+key)
}
