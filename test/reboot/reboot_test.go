package reboot

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// The limits are those of an emulated machine on two busy cores.
const (
	bootLimit = 5 * time.Minute
	// prepareLimit is for an emulated processor on a slow machine, where nine dumps took
	// longer than the five minutes that stasis gives them.
	prepareLimit = 15 * time.Minute
	podsLimit    = 15 * time.Minute
	offLimit     = 10 * time.Minute
	lookLimit    = 2 * time.Minute
)

// remember waits until all pods answer and go on, tells each something that it
// knows only in its memory, and returns what they say then.
func (n *node) remember() state {
	n.t.Helper()
	first := n.await("all pods answer", podsLimit, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	tokens := map[string]string{}
	for _, w := range n.pods {
		if w.tell == nil {
			continue
		}
		tokens[w.name] = token()
		if err := w.tell(ctx, n, first.pods[w.name].Status.PodIP, tokens[w.name]); err != nil {
			n.t.Fatalf("telling %s: %v", w.name, err)
		}
	}
	told := n.await("all pods remember", 5*time.Minute, func(s state) error {
		for name, want := range tokens {
			if got := s.facts[name].same["told"]; got != want {
				return fmt.Errorf("%s remembers %q, it was told %q", name, got, want)
			}
		}
		return nil
	})
	return n.await("all pods go on", 5*time.Minute, func(s state) error { return n.goOn(s, told) })
}

// goOn says whether each pod has gone on between two looks.
func (n *node) goOn(now, before state) error {
	for _, w := range n.pods {
		if err := now.facts[w.name].goesOn(before.facts[w.name]); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return nil
}

// goneOn checks, after a reboot in which nothing went wrong, that each pod that
// opted in is where it was and goes on, and that the others began anew.
// seen is how many events there were before.
func (n *node) goneOn(kernel string, before state, seen int) {
	n.t.Helper()
	t := n.t
	s := n.await("all pods answer", podsLimit, nil)
	n.log("from power-on to the last pod's answer: %.0f s", time.Since(n.booted).Seconds())
	n.await("all pods go on", 5*time.Minute, func(now state) error { return n.goOn(now, s) })
	if got := strings.TrimSpace(n.must(time.Minute, "uname -r")); !strings.HasPrefix(got, kernel+".") {
		t.Errorf("the kernel is %s, not %s", got, kernel)
	}
	restored, other := map[string]int{}, map[string][]string{}
	givenUp := map[string]int{} // starts for which the kubelet did not wait
	for _, e := range n.events()[seen:] {
		if e.Identity == nil {
			continue
		}
		key := strings.TrimSuffix(e.PodName, "-node") + "/" + e.Identity.Container
		switch {
		case e.Type == event.Restored:
			restored[key]++
		case e.Type == event.Dumped:
		case e.GivenUp():
			givenUp[key]++
			n.log("%s: %s", key, e.Reason)
		default:
			other[key] = append(other[key], fmt.Sprintf("%s: %s", e.Type, e.Reason))
		}
	}
	status := map[string]string{} // what the operator is told
	for _, line := range strings.Split(n.must(lookLimit, `stasis status -o json | jq -r '.reboot.containers[] | .podName + "/" + .identity.container + " " + .state + " " + .stateReason'`), "\n") {
		if name, is, ok := strings.Cut(line, " "); ok {
			status[strings.Replace(name, "-node/", "/", 1)] = strings.TrimSpace(is)
		}
	}
	n.log("%s", n.must(lookLimit, "stasis status"))
	failed := false
	for _, w := range n.pods {
		for _, c := range w.containers {
			t.Run(w.name+"/"+c.name, func(t *testing.T) {
				defer func() { failed = failed || t.Failed() }()
				key := w.name + "/" + c.name
				old, now := before.pods[w.name].attempt(c.name), s.pods[w.name].attempt(c.name)
				if w.key == "" && now != old+1+givenUp[key] {
					t.Errorf("attempt %d follows %d, %d starts were given up", now, old, givenUp[key])
				}
				for _, st := range s.pods[w.name].Status.ContainerStatuses {
					if st.Name == c.name && st.LastState.Terminated != nil && st.LastState.Terminated.ExitCode == 0 {
						t.Error("it ended with exit code 0")
					}
				}
				for _, reason := range other[key] {
					t.Error(reason)
				}
				logs := s.logs[n.uid(w)+"/"+c.name]
				first, last := logs[now].first, logs[old].last
				if w.cold {
					if first != 1 || restored[key] != 0 {
						t.Errorf("it did not opt in, but begins with %d, %d restored", first, restored[key])
					}
					return
				}
				if restored[key] != 1 {
					t.Errorf("restored %d times", restored[key])
				}
				if status[key] != "restored" {
					t.Errorf("stasis status calls it %q", status[key])
				}
				switch seen := before.facts[w.name].grows[c.name]; {
				case !c.counts || w.key != "":
				case last == 0 && first > seen:
					t.Logf("it goes on with %d, after %d and more; the old log is gone", first, seen)
				case first != last+1:
					t.Errorf("it begins with %d, it had come to %d", first, last)
				default:
					t.Logf("it had come to %d, and goes on with %d", last, first)
				}
				if err := s.facts[w.name].after(before.facts[w.name]); err != nil {
					t.Error(err)
				}
			})
		}
	}
	for _, line := range s.lost {
		t.Error(line)
	}
	if failed || t.Failed() {
		n.explain()
	}
}

// prepare runs the command and shows what it says.
func (n *node) prepare(flags string) {
	n.t.Helper()
	n.t.Log(n.must(prepareLimit, "stasis prepare-reboot --stop-kubelet --timeout 14m "+flags))
}

// reboot asks systemd for it, as an operator does.
func (n *node) reboot() {
	n.t.Helper()
	n.shutdown("systemctl reboot")
}

// shutdown waits for the machine's end, which may come before the command's.
func (n *node) shutdown(command string) {
	n.t.Helper()
	begin := time.Now()
	if _, err := n.sh(offLimit, command); err != nil {
		n.log("%s: %v", command, err)
	}
	n.off(offLimit)
	n.log("%s took %.0f s", command, time.Since(begin).Seconds())
}

// saved is the node that all tests begin with: it has booted once, with kernel
// 6.12, and its pods have told what they hold.
var saved struct {
	once   sync.Once
	node   *node
	before state
	events int
	cold   time.Duration // from power-on to the last pod's answer
}

func TestMain(m *testing.M) {
	code := m.Run()
	if saved.node != nil {
		os.RemoveAll(saved.node.dir)
	}
	os.Exit(code)
}

// ready is a copy of the saved node, running.
func ready(t *testing.T) (*node, state) {
	t.Helper()
	saved.once.Do(func() {
		n := newNode(t, workloads(t, envInt(t, "PODS", len(kinds()))))
		n.keep = true
		n.on("6.12", defaultCPU)
		n.up(bootLimit)
		n.await("all pods answer", podsLimit, nil)
		saved.cold = time.Since(n.booted)
		n.log("from power-on to the last pod's answer, cold: %.0f s", saved.cold.Seconds())
		saved.before = n.remember()
		saved.events = len(n.events())
		n.must(time.Minute, "sync")
		n.save()
		saved.node = n
	})
	if saved.node == nil {
		t.Fatal("there is no node to begin with: see the first test")
	}
	n := &node{pods: saved.node.pods, generation: map[string]int{}}
	n.machine = copyOf(t, saved.node.machine, "6.12", defaultCPU)
	n.up(time.Minute)
	return n, saved.before
}

// TestReboot: a node with a pod of each kind reboots from one kernel into
// another: first prepared by hand, then, right after, back and by a plain
// `systemctl reboot`, which the units prepare.
func TestReboot(t *testing.T) {
	n, before := ready(t)
	seen := saved.events
	begin := time.Now()
	n.prepare("")
	n.log("stasis prepare-reboot took %.0f s", time.Since(begin).Seconds())
	// As a StatefulSet's pod comes back: another UID, the same key.
	for _, w := range n.pods {
		if w.key != "" {
			n.generation[w.name]++
			n.write("/etc/kubernetes/manifests/"+w.name+".yaml", w.manifest(n.generation[w.name]))
		}
	}
	n.reboot()
	n.on("7.2", defaultCPU)
	n.up(bootLimit)
	t.Run("6.12 to 7.2", func(t *testing.T) { n.sub(t, func() { n.goneOn("7.2", before, seen) }) })
	if envInt(t, "REBOOTS", 2) < 2 {
		return
	}
	before = n.remember()
	seen = len(n.events())
	n.reboot()
	n.on("6.12", defaultCPU)
	n.up(bootLimit)
	t.Run("7.2 to 6.12, unattended", func(t *testing.T) { n.sub(t, func() { n.goneOn("6.12", before, seen) }) })
}

// TestRebootWithoutLogind: a shutdown that does not ask logind, and so is not
// held up; only the order of the units is left.
func TestRebootWithoutLogind(t *testing.T) {
	n, before := ready(t)
	n.shutdown("systemctl start --no-block --job-mode=replace-irreversibly reboot.target")
	n.on("7.2", defaultCPU)
	n.up(bootLimit)
	n.goneOn("7.2", before, saved.events)
}

// sub lets the node report to a subtest.
func (n *node) sub(t *testing.T, f func()) {
	t.Helper()
	outer := n.t
	n.t = t
	defer func() { n.t = outer }()
	f()
}
