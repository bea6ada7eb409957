package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// mapping is a part of /proc/PID/smaps.
type mapping struct {
	name      string // empty for anonymous memory
	size      int64  // bytes
	anonymous int64  // bytes
	flags     string // of VmFlags, each between spaces
}

var smapsHead = regexp.MustCompile(`^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$`)

// smaps are the mappings of the container's first process.
func (c *ctr) smaps() (ms []mapping) {
	c.p.n.t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(c.pid()), "smaps"))
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		if m := smapsHead.FindStringSubmatch(line); m != nil {
			ms = append(ms, mapping{name: m[1]})
			continue
		}
		last := &ms[len(ms)-1]
		var kb int64
		if n, _ := fmt.Sscanf(line, "Size: %d kB", &kb); n == 1 {
			last.size = kb << 10
		}
		if n, _ := fmt.Sscanf(line, "Anonymous: %d kB", &kb); n == 1 {
			last.anonymous = kb << 10
		}
		if flags, ok := strings.CutPrefix(line, "VmFlags: "); ok {
			last.flags = " " + strings.TrimSpace(flags) + " "
		}
	}
	return ms
}

// wantOffered fails unless the process's private memory is offered to the kernel
// for merging, that alone, and at least so much of it, or none at all.
func (c *ctr) wantOffered(want bool, least int64) {
	c.p.n.t.Helper()
	var offered int64
	heap := false
	for _, m := range c.smaps() {
		if !strings.Contains(m.flags, " mg ") {
			continue
		}
		offered += m.anonymous
		heap = heap || m.name == "[heap]"
		switch {
		case !want:
			c.p.n.t.Errorf("mapping %+v is offered", m)
		case m.name != "" && m.name != "[heap]" && !strings.HasPrefix(m.name, "[anon"):
			c.p.n.t.Errorf("mapping %+v is offered, which is not private memory", m)
		}
	}
	if want && (!heap || offered < least) {
		c.p.n.t.Errorf("%d MiB are offered, want %d; the heap: %v", offered>>20, least>>20, heap)
	}
}

// TestMerge: a clone whose pod asks for it offers its memory to the kernel for
// merging; others do not, whatever they come from. It holds over dumps and
// restores of the clone, and memory has its content.
func TestMerge(t *testing.T) {
	const mb = 80
	n, first, second, key := newNode(t), uniqueKey(t), uniqueKey(t), uniqueKey(t)
	removeTemplate(t, first)
	removeTemplate(t, second)
	can := criu.CanMerge()
	command := patterned(mb, 1, false, "marker-"+key)
	src := n.runPod(first, map[string]string{checkpoint.AnnotationPolicy: "template"}).start("c", "python", command)
	before := src.waitRounds(1)
	src.makeTemplate(t, first)
	src.wantOffered(false, 0)
	src.p.remove()
	merge := []string{checkpoint.AnnotationMerge, "true"}
	start := func(p *pod, want bool) *ctr {
		t.Helper()
		c := p.start("c", "python", command)
		c.wantLazy()
		c.wantGoesOn(before)
		c.wantOffered(want, mb<<20)
		return c
	}

	start(clonePod(n, first), false).p.remove()
	eager := clonePod(n, first, append(merge, checkpoint.AnnotationMemory, "eager")...).start("c", "python", command)
	eager.wantGoesOn(before)
	eager.wantOffered(can, mb<<20)
	eager.p.remove()

	c := start(clonePod(n, first, merge...), can)
	c.makeTemplate(t, second)
	c.p.remove()
	start(clonePod(n, second), false).p.remove()
	start(clonePod(n, second, merge...), can).p.remove()

	own := annotate(key, append(merge, checkpoint.AnnotationTemplate, first)...)
	for range 2 { // from the template, and from its own checkpoint
		c := start(n.runPod(key, own), can)
		c.stop(60)
		wantEvent(t, key, event.Dumped, "")
		c.p.remove()
	}
	wantNoneLeft(t, "marker-"+key)
}
