package shim

import (
	"runtime/debug"
	"testing"
)

// TestCollectLess: the last restore that ends puts back what was set.
func TestCollectLess(t *testing.T) {
	percent := func() int {
		p := debug.SetGCPercent(-1)
		debug.SetGCPercent(p)
		return p
	}
	defer debug.SetGCPercent(debug.SetGCPercent(40))
	first, second := collectLess(), collectLess()
	if got := percent(); got != restoreGCPercent {
		t.Errorf("during two restores: %d", got)
	}
	first()
	if got := percent(); got != restoreGCPercent {
		t.Errorf("during one restore: %d", got)
	}
	second()
	if got := percent(); got != 40 {
		t.Errorf("after both: %d, want 40", got)
	}
}
