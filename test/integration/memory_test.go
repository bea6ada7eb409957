package integration

import (
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// growing needs little memory until there is a file /grow, then 64 MiB more.
const growing = `
import os, time
n, hoard = 0, None
while True:
    n += 1
    if hoard is None and os.path.exists("/grow"):
        hoard = bytearray(os.urandom(64 << 20))
        print("grown", flush=True)
    print("count", n, hoard is not None, flush=True)
    time.sleep(0.05)
`

func withMemoryLimit(mib int64) ctrOption {
	return func(c *cri.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = mib << 20 }
}

// TestMemoryLimit: what cannot fit into a container's memory is refused before
// anything of it is started, the reason names both sizes, and the checkpoint
// stays for whoever may use more.
func TestMemoryLimit(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	program := []string{"python3", "-c", growing}
	grown := func(p *pod) *ctr {
		c := p.start("c", "python", program, withMemoryLimit(256))
		c.mustExec("touch", "/grow")
		c.waitLog("grown")
		return c
	}
	wantRefused := func(p *pod, typ event.Type) {
		t.Helper()
		p.wantOutcome(typ, "memory-limit", "the container may use 40960 KiB, the ")
	}

	src := grown(n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"}))
	src.makeTemplate(t, name)
	small := clonePod(n, name).start("c", "python", program, withMemoryLimit(40))
	small.waitCount(5)
	if ns, _ := counts(small.log()); ns[0] != 1 {
		t.Errorf("it begins with count %d", ns[0])
	}
	wantRefused(small.p, event.ColdStart)
	strict := clonePod(n, name, checkpoint.AnnotationOnFailure, "fail")
	if c, err := strict.tryCreate("c", "python", program, withMemoryLimit(40)); err == nil && c.tryStart() == nil {
		t.Error("it started")
	}
	wantRefused(strict, event.RestoreFail)
	large := clonePod(n, name).start("c", "python", program, withMemoryLimit(128))
	large.waitCount(5)
	large.p.wantOutcome(event.Restored, "", name)

	key := uniqueKey(t)
	own := grown(n.runPod(key, annotate(key)))
	own.stop(10)
	own.p.remove()
	again := n.runPod(key, annotate(key))
	c := again.start("c", "python", program, withMemoryLimit(40))
	c.waitCount(5)
	wantEvent(t, key, event.ColdStart, "memory-limit")
	if rs := records(t, key); len(rs) != 1 {
		t.Errorf("records %v", rs)
	}
}
