package reboot

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// A cut is a moment at which the power goes.
type cut struct {
	phase string  // prepare, boot or restore
	at    float64 // how far into the phase, as a part of the time it took the last time
}

// cuts spreads n moments over the three phases, evenly within each.
func cuts(n int) []cut {
	phases := []string{"prepare", "prepare", "boot", "restore", "restore"} // where there is more to break, more often
	var all []cut
	for i := range n {
		all = append(all, cut{phase: phases[i%len(phases)]})
	}
	for _, phase := range []string{"prepare", "boot", "restore"} {
		var of []*cut
		for i := range all {
			if all[i].phase == phase {
				of = append(of, &all[i])
			}
		}
		for i, c := range of {
			c.at = (float64(i) + 0.5) / float64(len(of))
		}
	}
	return all
}

// TestPowerCut takes the power away at CUTS moments spread over the preparation,
// the boot and the restores. Afterwards each container that opted in has either
// gone on once, or has begun anew for a reason that can be told; none runs twice,
// none has ended with 0.
func TestPowerCut(t *testing.T) {
	count := envInt(t, "CUTS", 20)
	took := map[string]time.Duration{} // by phase, of the first that was not cut
	for i, c := range cuts(count) {
		t.Run(fmt.Sprintf("%02d %s %.0f%%", i+1, c.phase, 100*c.at), func(t *testing.T) {
			n, before := ready(t)
			n.cutPower(c, took)
			n.on("7.2", defaultCPU)
			n.up(bootLimit)
			n.afterCut(before, c.phase != "prepare")
		})
	}
}

// cutPower goes through the phases and takes the power away in the right one.
// A phase whose length is not known yet is taken for a minute long.
func (n *node) cutPower(c cut, took map[string]time.Duration) {
	n.t.Helper()
	phase := func(name string, run func()) (over bool) {
		begin := time.Now()
		if c.phase != name {
			run()
			took[name] = time.Since(begin)
			return false
		}
		length := took[name]
		if length == 0 {
			length = time.Minute
		}
		after := time.Duration(c.at * float64(length))
		n.log("power cut %v into %s, which takes about %v", after.Round(100*time.Millisecond), name, length.Round(time.Second))
		time.Sleep(after)
		n.cut()
		return true
	}
	prepare := "stasis prepare-reboot --stop-kubelet"
	if c.phase == "prepare" {
		go n.sh(offLimit, prepare) //nolint:errcheck // cut off
	}
	if phase("prepare", func() { n.prepare("") }) {
		return
	}
	n.cut() // what is dumped must last without an orderly shutdown, which other tests have
	n.on("7.2", defaultCPU)
	if phase("boot", func() { n.up(bootLimit) }) {
		return
	}
	if phase("restore", func() { n.await("all pods answer", podsLimit, nil) }) {
		return
	}
}

// afterCut checks what became of each container; prepared: all were dumped before
// the power cut.
func (n *node) afterCut(before state, prepared bool) {
	n.t.Helper()
	t := n.t
	s := n.await("all pods answer", podsLimit, nil)
	type history struct {
		dumped   map[string]bool
		restored map[string]int // by checkpoint
		reasons  []string
	}
	of := map[string]*history{}
	for _, e := range n.events()[saved.events:] {
		if e.Identity == nil {
			continue
		}
		key := strings.TrimSuffix(e.PodName, "-node") + "/" + e.Identity.Container
		h := of[key]
		if h == nil {
			h = &history{map[string]bool{}, map[string]int{}, nil}
			of[key] = h
		}
		switch e.Type {
		case event.Dumped:
			h.dumped[string(e.CheckpointID)] = true
		case event.Restored:
			h.restored[string(e.CheckpointID)]++
		case event.ColdStart, event.Quarantined, event.RestoreFail, event.DumpFailed, event.Removed:
			h.reasons = append(h.reasons, string(e.Type)+": "+e.Reason)
		}
	}
	running := strings.Fields(n.must(lookLimit, `crictl ps -o json | jq -r '.containers[] | .labels["io.kubernetes.pod.name"] + "/" + .metadata.name'`))
	records := n.must(lookLimit, "stasis ls -o json | jq -r '.[] | .state + \" \" + .path'; ls -A /var/lib/stasis")
	if strings.Contains(records, "corrupt ") {
		t.Errorf("a corrupt checkpoint is left:\n%s", records)
	}
	if strings.Contains(records, ".stage-") {
		t.Logf("a stage is left until the collection of garbage:\n%s", records)
	}
	for _, w := range n.pods {
		for _, c := range w.containers {
			key := w.name + "/" + c.name
			h := of[key]
			if h == nil {
				h = &history{}
			}
			same := n.sameAs(w, c, s, before)
			for id, times := range h.restored {
				if times > 1 {
					t.Errorf("%s: restored %d times from %s", key, times, id)
				}
			}
			alive := 0
			for _, name := range running {
				if name == w.name+"-node/"+c.name {
					alive++
				}
			}
			if alive != 1 {
				t.Errorf("%s: %d of it run", key, alive)
			}
			for _, st := range s.pods[w.name].Status.ContainerStatuses {
				if st.Name == c.name && st.LastState.Terminated != nil && st.LastState.Terminated.ExitCode == 0 {
					t.Errorf("%s: ended with 0", key)
				}
			}
			switch {
			case w.cold && (same || len(h.restored) > 0):
				t.Errorf("%s: it did not opt in, but was restored", key)
			case w.cold:
			case same && len(h.restored) != 1:
				t.Errorf("%s: goes on, the log has %d restores", key, len(h.restored))
			case same:
				n.log("%s: goes on", key)
			case len(h.restored) > 0:
				n.log("%s: anew, its checkpoint was used before the power cut", key)
			case len(h.dumped) == 0 && !prepared:
				n.log("%s: anew, no checkpoint was committed before the power cut", key)
			case len(h.reasons) > 0:
				n.log("%s: anew: %s", key, strings.Join(h.reasons, "; "))
			default:
				t.Errorf("%s: anew without a reason; dumped %v", key, slices.Collect(maps.Keys(h.dumped)))
			}
		}
	}
	for _, line := range s.lost {
		t.Error(line)
	}
	if t.Failed() {
		n.explain()
	}
}

// sameAs says whether the container that runs now is the one that ran before.
func (n *node) sameAs(w workload, c container, now, before state) bool {
	if c.counts {
		l := now.logs[now.pods[w.name].Metadata.UID+"/"+c.name]
		return l[now.pods[w.name].attempt(c.name)].first > 1
	}
	return now.facts[w.name].after(before.facts[w.name]) == nil
}
