package integration

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestCRICheckpoint makes an archive by the CRI call, of a cold and of a
// restored container, and reads it with the tools that users have. The
// container runs on.
func TestCRICheckpoint(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	check := func(c *ctr) {
		t.Helper()
		at := c.waitCount(5)
		archive := filepath.Join(t.TempDir(), "checkpoint.tar")
		if _, err := n.rt.CheckpointContainer(n.ctx(), &cri.CheckpointContainerRequest{ContainerId: c.id, Location: archive, Timeout: 50}); err != nil {
			t.Fatalf("checkpoint: %v", err)
		}
		c.waitCount(at + 3)
		if st := c.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("state %v after the checkpoint", st.State)
		}
		members := run(t, "tar", "tf", archive)
		for _, want := range []string{"config.dump", "spec.dump", "checkpoint/pstree.img", "checkpoint/pages-1.img"} {
			if !strings.Contains(members, want) {
				t.Errorf("no %s in the archive:\n%s", want, members)
			}
		}
		if out := run(t, "checkpointctl", "show", archive); !strings.Contains(out, "busybox") {
			t.Errorf("checkpointctl show:\n%s", out)
		}
		if out := run(t, "checkpointctl", "inspect", "--ps-tree", archive); !strings.Contains(out, "sh") {
			t.Errorf("checkpointctl inspect:\n%s", out)
		}
		dir := t.TempDir()
		run(t, "tar", "xf", archive, "-C", dir)
		if out := run(t, "crit", "show", filepath.Join(dir, "checkpoint/pstree.img")); !strings.Contains(out, `"magic": "PSTREE"`) {
			t.Errorf("crit show:\n%s", out)
		}
	}
	check(c)
	c.stop(30)
	wantEvent(t, key, event.Dumped, "")
	p.remove()
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", shell(counting))
	wantEvent(t, key, event.Restored, "")
	check(c)
	c.stop(30)
}
