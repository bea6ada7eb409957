package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// TestCLI walks a real checkpoint through the commands: it is listed,
// inspected, verified, exported, read by the tools that users have, removed,
// imported, and a container goes on from the import.
func TestCLI(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	c.mustExec("/bin/sh", "-c", "echo root >/f; rm /etc/passwd")
	c.waitCount(10)
	if out := run(t, "stasis", "doctor", "--container", c.id, "--containerd-config", "/etc/containerd/config.toml"); !strings.Contains(out, "ok") {
		t.Errorf("doctor:\n%s", out)
	}
	c.stop(30)
	ns, _ := counts(c.log())
	last := ns[len(ns)-1]
	p.remove()
	rs := records(t, key)
	if len(rs) != 1 {
		t.Fatalf("records %v; events %+v", rs, events(t, key))
	}
	id := filepath.Base(rs[0])

	var list []struct {
		ID       string
		State    string
		Manifest checkpoint.Manifest
	}
	if err := json.Unmarshal([]byte(run(t, "stasis", "ls", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	found := false
	for _, r := range list {
		found = found || r.ID == id && r.State == "committed"
	}
	if !found {
		t.Errorf("%s is not in the list: %+v", id, list)
	}
	if out := run(t, "stasis", "ls"); !strings.Contains(out, key) {
		t.Errorf("ls:\n%s", out)
	}
	if out := run(t, "stasis", "inspect", id); !strings.Contains(out, "sh") || !strings.Contains(out, "pipe") {
		t.Errorf("inspect:\n%s", out)
	}
	run(t, "stasis", "verify", id)
	if out := run(t, "stasis", "events"); !strings.Contains(out, key) {
		t.Errorf("events:\n%s", out)
	}
	archive := filepath.Join(t.TempDir(), "a.tar")
	run(t, "stasis", "export", id, archive)
	if fi, err := os.Stat(archive); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("archive: %v, %v; want mode 0600", fi.Mode(), err)
	}
	if out := run(t, "checkpointctl", "show", archive); !strings.Contains(out, "busybox") {
		t.Errorf("checkpointctl show:\n%s", out)
	}
	// Not --all: that reads the memory of every process, and gives up on a
	// zombie, which the shell's last child may have been.
	if out := run(t, "checkpointctl", "inspect", "--ps-tree", archive); !strings.Contains(out, "sh") {
		t.Errorf("checkpointctl inspect:\n%s", out)
	}
	if out := run(t, "stasis", "rm", "--dry-run", id); !strings.Contains(out, id) || len(records(t, key)) != 1 {
		t.Errorf("rm --dry-run:\n%s", out)
	}
	run(t, "stasis", "rm", "--yes", id)
	if rs := records(t, key); len(rs) != 0 {
		t.Errorf("after rm: %v", rs)
	}
	err := exec.Command("stasis", "inspect", id).Run()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 3 {
		t.Errorf("inspect of a removed checkpoint: %v, want exit code 3", err)
	}

	run(t, "stasis", "import", archive, "--namespace", "default", "--key", key, "--container", "c")
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", shell(counting))
	wantEvent(t, key, event.Restored, "")
	c.waitCount(last + 2)
	if ns, _ := counts(c.log()); ns[0] != last+1 {
		t.Errorf("the import goes on with %d, want %d", ns[0], last+1)
	}
	if got := c.mustExec("/bin/sh", "-c", "cat /f; ls /etc/passwd 2>&1 | grep -c 'No such'"); got != "root\n1" {
		t.Errorf("writable layer of the import: %q", got)
	}
}

// TestImportOfCRIArchive restores a container from the archive of a CRI
// checkpoint call, as the operator's explicit action.
func TestImportOfCRIArchive(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	c.mustExec("/bin/sh", "-c", "echo root >/f")
	at := c.waitCount(10)
	archive := filepath.Join(t.TempDir(), "cri.tar")
	if _, err := n.rt.CheckpointContainer(n.ctx(), &cri.CheckpointContainerRequest{ContainerId: c.id, Location: archive, Timeout: 50}); err != nil {
		t.Fatal(err)
	}
	digest := c.specAnnotations()[checkpoint.InternalImageDigest]
	c.stop(0) // SIGKILL: no dump
	p.remove()
	run(t, "stasis", "import", archive, "--namespace", "default", "--key", key, "--container", "c",
		"--image-digest", digest, "--assume-this-host")
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", shell(counting))
	wantEvent(t, key, event.Restored, "")
	c.waitCount(at)
	if ns, _ := counts(c.log()); ns[0] < at-5 {
		t.Errorf("began with %d, the archive was made at about %d", ns[0], at)
	}
	if got := c.mustExec("cat", "/f"); got != "root" {
		t.Errorf("writable layer: %q", got)
	}
}
