package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stasis-containers/stasis/nri"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
)

// prepareReboot runs stasis prepare-reboot on the node, which has no kubelet.
func prepareReboot(t *testing.T, wantCode int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, err strings.Builder
	cmd := exec.Command("stasis", append([]string{"prepare-reboot", "--ignore-kubelet"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &err
	if rerr := cmd.Run(); cmd.ProcessState.ExitCode() != wantCode {
		t.Fatalf("stasis prepare-reboot %s: %v, want exit code %d\n%s%s", strings.Join(args, " "), rerr, wantCode, out.String(), err.String())
	}
	return out.String(), err.String()
}

func prepared(t *testing.T, wantCode int, args ...string) map[string]reboot.Entry {
	t.Helper()
	out, _ := prepareReboot(t, wantCode, append(args, "-o", "json")...)
	var m reboot.Manifest
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	all := map[string]reboot.Entry{}
	for _, e := range m.Containers {
		all[e.Identity.Key] = e
	}
	return all
}

// TestPrepareRebootCommand walks an operator's way: look, prepare, prepare
// again, abort, prepare with one that fails, complete it, and go down.
func TestPrepareRebootCommand(t *testing.T) {
	n := newNode(t)
	keys := []string{uniqueKey(t), uniqueKey(t)}
	var pods []*pod
	var ctrs []*ctr
	for i, key := range keys {
		policy := []string{"reboot", "resume"}[i]
		p := n.runPod(key, annotate(key, checkpoint.AnnotationPolicy, policy))
		c := p.start("c", "busybox", shell(counting))
		c.waitCount(5)
		pods, ctrs = append(pods, p), append(ctrs, c)
	}
	stranger := n.runPod(uniqueKey(t), nil).start("c", "busybox", shell(counting))

	out, _ := prepareReboot(t, 0, "--dry-run")
	for _, want := range append(keys, "MEMORY", "2 containers, at most") {
		if !strings.Contains(out, want) {
			t.Errorf("dry run: no %q in\n%s", want, out)
		}
	}
	for _, c := range ctrs {
		at := c.waitCount(1)
		c.waitCount(at + 2) // nothing was frozen
	}

	out, stderr := prepareReboot(t, 0)
	for _, want := range append(keys, "dumped", "2 of 2 containers dumped") {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if !strings.Contains(stderr, "[2/2]") || !strings.Contains(stderr, "--abort") {
		t.Errorf("progress:\n%s", stderr)
	}
	if fi, err := os.Stat(filepath.Join(storeRoot, reboot.FileName)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("node manifest: %v, %v", fi, err)
	}
	first := prepared(t, 0)
	for _, key := range keys {
		if e := first[key]; e.Result != reboot.Dumped || len(records(t, key)) != 1 || filepath.Base(records(t, key)[0]) != string(e.CheckpointID) {
			t.Errorf("%s: %+v, records %v", key, e, records(t, key))
		}
	}
	stranger.waitCount(stranger.waitCount(1) + 2)
	eventually(t, "the daemon reports", func() error { return reportIs(t, false, reboot.Pending, keys...) })

	out, _ = prepareReboot(t, 0, "--abort")
	for i, key := range keys {
		if !strings.Contains(out, key) || len(records(t, key)) != 0 {
			t.Errorf("abort: records %v\n%s", records(t, key), out)
		}
		ns, _ := counts(ctrs[i].log())
		ctrs[i].waitCount(ns[len(ns)-1] + 2)
	}
	if _, err := os.Stat(filepath.Join(storeRoot, reboot.FileName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the node manifest is left: %v", err)
	}
	prepareReboot(t, 0, "--abort")

	// One whose shim cannot be reached: it runs on, all others are dumped.
	other := keys[1]
	third := uniqueKey(t)
	p := n.runPod(third, annotate(third))
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(2)
	socket := filepath.Join("/run/containerd/io.containerd.runtime.v2.task/k8s.io", c.id, "bootstrap.json")
	bootstrap, err := os.ReadFile(socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(socket, []byte(`{"version":3,"address":"unix:///nowhere","protocol":"ttrpc"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	all := prepared(t, 1)
	if all[third].Result != reboot.Failed || all[third].Reason == "" || all[other].Result != reboot.Dumped {
		t.Errorf("%+v", all)
	}
	c.waitCount(c.waitCount(1) + 2)
	if err := os.WriteFile(socket, bootstrap, 0o600); err != nil {
		t.Fatal(err)
	}
	again := prepared(t, 0, "--best-effort")
	if again[third].Result != reboot.Dumped || again[other].CheckpointID != all[other].CheckpointID {
		t.Errorf("before %+v, now %+v", all, again)
	}

	// The node goes down; here, every container is killed, and made again.
	ctrs, pods, keys = append(ctrs, c), append(pods, p), append(keys, third)
	for i, key := range keys {
		ns, _ := counts(ctrs[i].log())
		last := ns[len(ns)-1]
		ctrs[i].stop(0)
		if st := ctrs[i].status(); st.ExitCode == 0 {
			t.Errorf("%s: exit code %d", key, st.ExitCode)
		}
		pods[i].remove()
		next := n.runPod(key, annotate(key)).start("c", "busybox", shell(counting))
		wantEvent(t, key, event.Restored, "")
		next.waitCount(last + 2)
		if ns, _ := counts(next.log()); ns[0] != last+1 {
			t.Errorf("%s goes on with %d, want %d", key, ns[0], last+1)
		}
	}
	eventually(t, "all are restored", func() error { return reportIs(t, false, reboot.Restored, keys...) })
	if out := run(t, "stasis", "status"); !strings.Contains(out, "3 restored") {
		t.Errorf("status:\n%s", out)
	}
}

// reportIs compares what the daemon says of the last preparation.
func reportIs(t *testing.T, rebooted bool, state reboot.State, keys ...string) error {
	t.Helper()
	var s nri.Status
	if err := json.Unmarshal([]byte(run(t, "stasis", "status", "-o", "json")), &s); err != nil {
		return err
	}
	if s.Reboot == nil || s.Reboot.Rebooted != rebooted || s.Reboot.Counts[state] != len(keys) || len(s.Reboot.Containers) != len(keys) {
		return fmt.Errorf("report %+v, error %q", s.Reboot, s.RebootError)
	}
	return nil
}
