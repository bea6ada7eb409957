package nri

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"

	"github.com/stasis-containers/stasis/nri/eventlog"
)

// rebootedNode is a store with the manifest of another boot: containers 0 to 2
// were dumped, 3 was not.
type rebootedNode struct {
	t        *testing.T
	s        *server
	tail     *eventlog.Tailer
	manifest reboot.Manifest
}

func newRebootedNode(t *testing.T) *rebootedNode {
	t.Helper()
	st, err := store.Open(fsys.OS{}, filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	n := &rebootedNode{t: t, s: newServer(Config{Root: st.Root()}, st)}
	n.s.reboot.bootID = "boot-2"
	n.manifest = reboot.Manifest{FormatVersion: reboot.FormatVersion, BootID: "boot-1", KernelRelease: "6.12.1", PreparedAt: time.Now()}
	for i := range 4 {
		e := reboot.Entry{Identity: identityNumber(i), ContainerID: fmt.Sprint("ctr", i), Result: reboot.Dumped}
		if i < 3 {
			e.CheckpointID = writeRecord(t, st.Root(), e.Identity, time.Now())
		} else {
			e.Result, e.Reason = reboot.Failed, "io_uring"
		}
		n.manifest.Containers = append(n.manifest.Containers, e)
	}
	n.write()
	if n.tail, err = eventlog.NewTailer(st.Root(), false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.tail.Close() })
	return n
}

func (n *rebootedNode) write() {
	n.t.Helper()
	b, err := json.Marshal(n.manifest)
	path := filepath.Join(n.s.config.Root, reboot.FileName)
	if err == nil {
		err = os.WriteFile(path+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path) //nolint:forbidigo // nothing here must survive a crash
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// tick is one round of the main loop.
func (n *rebootedNode) tick() {
	n.t.Helper()
	if err := n.tail.Poll(n.s.reboot.observe); err != nil {
		n.t.Fatal(err)
	}
	n.s.followReboot(context.Background())
	n.s.nextList = time.Time{}
	if _, err := n.s.refresh(context.Background(), true); err != nil {
		n.t.Fatal(err)
	}
}

// states are the containers' states and reasons, and checks the metrics.
func (n *rebootedNode) states() string {
	n.t.Helper()
	n.tick()
	n.tick()
	r := n.s.status().Reboot
	if r == nil {
		return "none"
	}
	var all []string
	counts := map[reboot.State]int{}
	for _, c := range r.Containers {
		all = append(all, string(c.State))
		counts[c.State]++
	}
	for _, state := range reboot.States {
		want := counts[state]
		if !r.Rebooted {
			want = 0
		}
		if got := testutil.ToFloat64(n.s.metrics.rebooted.WithLabelValues(string(state))); got != float64(want) {
			n.t.Errorf("metric %s %v, want %d", state, got, want)
		}
	}
	return strings.Join(all, " ")
}

func (n *rebootedNode) want(states string) {
	n.t.Helper()
	if got := n.states(); got != states {
		n.t.Errorf("%s, want %s", got, states)
	}
}

func (n *rebootedNode) tell(i int, typ event.Type, reason string) {
	n.t.Helper()
	e := n.manifest.Containers[i]
	if err := event.Append(n.s.config.Root, event.Event{Type: typ, Identity: &e.Identity, ContainerID: "next", CheckpointID: e.CheckpointID, Reason: reason}); err != nil {
		n.t.Fatal(err)
	}
}

func TestRebootReport(t *testing.T) {
	n := newRebootedNode(t)
	ctx := context.Background()
	n.want("pending pending pending failed")
	r := n.s.status().Reboot
	if !r.Rebooted || r.Kernel != "6.12.1" || r.Containers[3].Reason != "io_uring" {
		t.Errorf("%+v", r)
	}
	// A shim claims, tells, and consumes.
	claim, err := n.s.store.Claim(ctx, n.manifest.Containers[0].CheckpointID, "next")
	if err != nil {
		t.Fatal(err)
	}
	n.want("pending pending pending failed")
	n.tell(0, event.Restored, "")
	if err := claim.Consume(ctx); err != nil {
		t.Fatal(err)
	}
	n.want("restored pending pending failed")
	n.tell(1, event.ColdStart, "cpu flag avx2 is missing")
	n.want("restored cold pending failed")
	if r := n.s.status().Reboot; r.Containers[1].Reason != "cpu flag avx2 is missing" {
		t.Errorf("%+v", r.Containers[1])
	}
	// A daemon that starts only now reads it all in the log.
	later := newServer(n.s.config, n.s.store)
	later.reboot.bootID = "boot-2"
	n.s = later
	n.want("restored cold pending failed")

	// The pod of the last one never returns. It is unknown to the daemon, which
	// is not dead: only age removes the checkpoint.
	n.s.config.GC = store.Policy{TTL: time.Hour, KeepPerIdentity: 2}
	n.s.gc(ctx)
	n.want("restored cold pending failed")
	n.s.config.GC.TTL = time.Nanosecond
	n.s.gc(ctx)
	n.want("restored cold expired failed")
	if !n.s.reboot.settled {
		t.Error("nobody is waited for, and nobody says so")
	}

	// The next preparation replaces all of it, and is of this boot.
	n.manifest.BootID, n.manifest.Containers = "boot-2", n.manifest.Containers[3:]
	n.write()
	n.want("failed")
	if n.s.status().Reboot.Rebooted {
		t.Error("it has not rebooted since")
	}
	if err := os.WriteFile(filepath.Join(n.s.config.Root, reboot.FileName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.want("none")
	if s := n.s.status(); !strings.Contains(s.RebootError, "corrupt") {
		t.Errorf("error %q", s.RebootError)
	}
	if err := os.Remove(filepath.Join(n.s.config.Root, reboot.FileName)); err != nil {
		t.Fatal(err)
	}
	n.want("none")
	if s := n.s.status(); s.RebootError != "" {
		t.Errorf("error %q", s.RebootError)
	}
}

// TestGCAfterBoot: after a boot no pod is known, and those that are still to
// come keep their checkpoints. Once a pod was seen to come and go, it counts as
// gone after a while.
func TestGCAfterBoot(t *testing.T) {
	st, err := store.Open(fsys.OS{}, filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	pod := testPod(nil)
	i := checkpoint.Identity{Namespace: "default", Key: pod.GetUid(), Container: "c"}
	id := checkpoint.NewID(i, time.Now())
	m := &checkpoint.Manifest{FormatVersion: checkpoint.FormatVersion, ID: id, Identity: i, CreatedAt: time.Now(), PodUID: pod.GetUid(), ImageDigest: digestA}
	stage, err := st.Stage(t.Context(), id)
	if err == nil {
		err = stage.Commit(t.Context(), m)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(Config{Root: st.Root(), GC: store.Policy{TTL: 72 * time.Hour, KeepPerIdentity: 2}}, st)
	pods := s.plugin.pods
	now := time.Now()
	pods.now = func() time.Time { return now }
	there := func(want bool) {
		t.Helper()
		s.gc(t.Context())
		records, err := st.List(t.Context())
		if err != nil || (len(records) == 1) != want {
			t.Errorf("records %v, %v; want one: %v", records, err, want)
		}
	}
	pods.replace(nil) // what containerd knows right after the boot
	now = now.Add(10 * deadAfter)
	there(true)
	other := testPod(nil)
	other.Id, other.Uid = "other", "uid-other"
	pods.add(other)
	pods.remove(other)
	now = now.Add(2 * deadAfter)
	there(true)
	pods.add(pod)
	there(true)
	pods.remove(pod)
	now = now.Add(deadAfter)
	there(false)
}
