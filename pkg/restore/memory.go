package restore

import (
	"fmt"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// checkMemory refuses what cannot fit: with fewer bytes than its processes had
// in memory the kernel would kill the container, or CRIU, in the middle of the
// restore. What fits barely may still be killed.
func (r *Request) checkMemory() error {
	if r.Spec.Linux == nil || r.Spec.Linux.Resources == nil || r.Spec.Linux.Resources.Memory == nil {
		return nil
	}
	m := r.Spec.Linux.Resources.Memory
	if m.Limit == nil || *m.Limit <= 0 {
		return nil // none, by the runtime spec
	}
	room := *m.Limit
	switch { // by the runtime spec, Swap limits memory and swap together
	case m.Swap == nil || *m.Swap < 0:
		room += r.SwapBytes
	case *m.Swap > room:
		room += min(*m.Swap-room, r.SwapBytes)
	}
	what := "checkpoint"
	if r.Manifest.Template != "" {
		what = "template"
	}
	if need := r.Manifest.ResidentBytes(); room < need {
		return &Refusal{Code: MemoryLimit, Err: fmt.Errorf("memory limit: the container may use %d KiB, the %s holds %d KiB of memory: %w",
			room>>10, what, (need+1023)>>10, checkpoint.ErrIncompatible)}
	}
	return nil
}
