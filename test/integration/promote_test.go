package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// waitTemplate waits until there is a template that was made of the pod.
func waitTemplate(t *testing.T, name string, p *pod) {
	t.Helper()
	eventually(t, "template of pod "+p.config.Metadata.Uid, func() error {
		for _, e := range events(t, p.config.Metadata.Uid) {
			if e.Type == event.Dumped && e.Reason == "template "+name {
				return nil
			}
		}
		return fmt.Errorf("events %+v", events(t, p.config.Metadata.Uid))
	})
}

// TestPromotion: the first replica becomes the template by itself and runs on,
// those that come later begin from it; another image makes another version.
func TestPromotion(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	replica := func() *pod { return clonePod(n, name, checkpoint.AnnotationPromoteAfter, "4s") }
	first := replica().start("c", "busybox", shell(counting))
	second := replica().start("c", "busybox", shell(counting)) // cold as well
	first.waitCount(20)
	if out := run(t, "stasis", "template", "ls"); strings.Contains(out, name) {
		t.Errorf("a template of a container that has run for a second:\n%s", out)
	}
	waitTemplate(t, name, first.p)
	ns, _ := counts(first.log())
	first.waitCount(ns[len(ns)-1] + 10)
	third := replica().start("c", "busybox", shell(counting))
	third.waitCount(30)
	if ns, _ := counts(third.log()); ns[0] < 30 {
		t.Errorf("the third replica begins with %d", ns[0])
	}
	third.p.wantOutcome(event.Restored, "", name)
	time.Sleep(6 * time.Second) // nobody else is promoted
	for _, c := range []*ctr{second, third} {
		for _, e := range events(t, c.p.config.Metadata.Uid) {
			if e.Type == event.Dumped || e.Type == event.PromoteFail {
				t.Errorf("%+v", e)
			}
		}
		ns, _ := counts(c.log())
		c.waitCount(ns[len(ns)-1] + 5)
	}
	other := replica().start("c", "busybox", shell(counting+"; exit 1"))
	other.p.wantOutcome(event.ColdStart, "mismatch", "differs in args")
	waitTemplate(t, name, other.p)

	// A new daemon goes on where the one before was killed. A template that was
	// removed does not come back from a clone.
	run(t, "stasis", "template", "rm", "default/"+name)
	for _, c := range []*ctr{first, second, other} {
		c.p.remove()
	}
	last := replica().start("c", "busybox", shell(counting))
	last.p.wantOutcome(event.ColdStart, "missing", name)
	time.Sleep(time.Second)
	restart(t, "stasisd")
	waitTemplate(t, name, last.p)
	for _, e := range events(t, third.p.config.Metadata.Uid) {
		if e.Type == event.Dumped {
			t.Errorf("%+v", e)
		}
	}
}

// TestPromotionFails: a container that cannot be dumped runs on, and the reason
// is told.
func TestPromotionFails(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	p := clonePod(n, name, checkpoint.AnnotationPromoteAfter, "1s")
	// A process under ptrace cannot be seized by CRIU.
	c := p.start("c", "python", []string{"python3", "-c", `
import ctypes, os, time
if os.fork() == 0:
    ctypes.CDLL(None).ptrace(0, 0, 0, 0)  # PTRACE_TRACEME
    while True: time.sleep(1)
n = 0
while True:
    n += 1
    print("count", n, "ptraced", flush=True)
    time.sleep(0.05)
`})
	eventually(t, "the event", func() error {
		for _, e := range events(t, p.config.Metadata.Uid) {
			if e.Type == event.PromoteFail {
				return nil
			}
		}
		return fmt.Errorf("none")
	})
	p.wantOutcome(event.PromoteFail, "internal", "attempt 1 of 4, again in 30s: ")
	ns, _ := counts(c.log())
	c.waitCount(ns[len(ns)-1] + 10)
}
