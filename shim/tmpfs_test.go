package shim

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/restore"
)

// TestTmpfsNotMade: one that cannot be mounted is no fault of the checkpoint, and for
// a container that was deleted none is made; either way nothing is left.
func TestTmpfsNotMade(t *testing.T) {
	c := newContainer("c")
	c.bundle = t.TempDir()
	plan := &restore.Plan{Tmpfs: []criu.Tmpfs{{Key: "k", Source: "tmpfs", Options: "no such option"}}}
	plan.CRIU.External = map[string]string{"k": filepath.Join(c.bundle, tmpfsDir, "k")}
	var refusal *restore.Refusal
	if err := c.mountTmpfs(plan); !errors.As(err, &refusal) || refusal.Code != restore.Internal || !strings.Contains(err.Error(), "no such option") {
		t.Errorf("error %v", err)
	}
	if left, err := os.ReadDir(c.bundle); err != nil || len(left) != 0 {
		t.Errorf("left in the bundle: %v, %v", left, err)
	}
	c.endTmpfs(t.Context(), true)
	if err := c.mountTmpfs(plan); err != nil {
		t.Errorf("after a delete: %v", err)
	}
	if left, err := os.ReadDir(c.bundle); err != nil || len(left) != 0 {
		t.Errorf("left in the bundle: %v, %v", left, err)
	}
}
