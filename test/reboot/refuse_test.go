package reboot

import (
	"strings"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// TestOtherProcessor: after the reboot the processor has fewer features than
// the programs have seen. They are refused with what is missing, begin anew,
// and their checkpoints are set aside.
func TestOtherProcessor(t *testing.T) {
	n, before := ready(t)
	seen := saved.events
	n.prepare("")
	n.reboot()
	n.on("7.2", "Westmere")
	n.up(bootLimit)
	s := n.await("all pods answer", podsLimit, nil)
	events := n.events()[seen:]
	aside := n.must(lookLimit, "stasis ls --state quarantined -o json | jq -r '.[].manifest.identity | .namespace + \"/\" + .key + \"/\" + .container'")
	for _, w := range n.pods {
		for _, c := range w.containers {
			if w.cold {
				continue
			}
			t.Run(w.name+"/"+c.name, func(t *testing.T) {
				var reason, identity string
				for _, e := range events {
					if e.Identity == nil || e.Identity.Container != c.name || !strings.HasPrefix(e.PodName, w.name+"-node") {
						continue
					}
					identity = e.Identity.String()
					switch e.Type {
					case event.Restored:
						t.Error("it was restored")
					case event.ColdStart:
						reason = e.Reason
					}
				}
				// Westmere has no AVX; which of the missing ones is named is not laid down.
				if !strings.Contains(strings.ToLower(reason), "cpu") {
					t.Errorf("the reason of its cold start names no feature of the processor: %q", reason)
				}
				t.Logf("cold: %s", reason)
				if !strings.Contains(aside, identity+"\n") {
					t.Errorf("%s is not among what is set aside:\n%s", identity, aside)
				}
				if c.counts {
					logs := s.logs[w.uid(0)+"/"+c.name]
					if first := logs[s.pods[w.name].attempt(c.name)].first; first != 1 {
						t.Errorf("it begins with %d", first)
					}
				} else if s.facts[w.name].after(before.facts[w.name]) == nil {
					t.Error("it knows what it knew before")
				}
			})
		}
	}
	if t.Failed() {
		n.explain()
	}
}
