package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
	"github.com/stasis-containers/stasis/pkg/restore"
)

func templatesOf(t *testing.T, st *store.Store) []store.Template {
	t.Helper()
	all, err := st.Templates(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestSnapshot: the container runs on with a template made of it, under each
// policy, and a second version takes the first one's place.
func TestSnapshot(t *testing.T) {
	for _, policy := range []checkpoint.Policy{checkpoint.PolicyTemplate, checkpoint.PolicyReboot, checkpoint.PolicyResume} {
		t.Run(string(policy), func(t *testing.T) {
			s, m, st := rebootable(t, policy)
			s.lookup("c").settings.TCP = checkpoint.TCPKeep
			if policy != checkpoint.PolicyTemplate {
				if _, err := s.Snapshot(t.Context(), "c", "shop"); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("not as its clones would be: %v", err)
				}
				s.lookup("c").settings.Template = "shop"
			}
			var last checkpoint.ID
			for range 2 {
				r, err := s.Snapshot(t.Context(), "c", "shop")
				if err != nil || r.CheckpointID == last || r.SizeBytes == 0 {
					t.Fatalf("%+v, %v", r, err)
				}
				last = r.CheckpointID
			}
			wantMachine(t, m, st, "running")
			wantStatus(t, s, control.Running)
			all := templatesOf(t, st)
			if len(all) != 1 || all[0].Version != last || all[0].Namespace != "ns" || all[0].Name != "shop" || all[0].Manifest.Settings.TCP != checkpoint.TCPClose {
				t.Errorf("templates %+v, want version %s only", all, last)
			}
			// The options of its own dumps are back.
			if b, err := os.ReadFile(filepath.Join(s.lookup("c").bundle, criuConfigFile)); err != nil || strings.Contains(string(b), "tcp-close") {
				t.Errorf("CRIU's configuration: %q, %v", b, err)
			}
			stop(t, s, 15)
			if dumps := policy == checkpoint.PolicyResume; dumps != (stateOf(t, st) == store.Committed) {
				t.Errorf("after the stop: %q", machineState(t, m, st))
			}
		})
	}
}

func TestSnapshotRefuses(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyTemplate)
	if _, err := s.Snapshot(t.Context(), "c", "../x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("hostile name: %v", err)
	}
	if _, err := s.Snapshot(t.Context(), "unknown", "shop"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown container: %v", err)
	}
	if _, err := s.Prepare(t.Context(), "c"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("it leaves no checkpoints, but was prepared for a reboot: %v", err)
	}
	m.dump = func(context.Context) error { return errors.New("no") }
	if _, err := s.Snapshot(t.Context(), "c", "shop"); err == nil || !strings.Contains(err.Error(), "CRIU failed") {
		t.Errorf("failed dump: %v", err)
	}
	wantMachine(t, m, st, "running")
	stop(t, s, 15)
	if _, err := s.Snapshot(t.Context(), "c", "shop"); !errdefs.IsUnavailable(err) {
		t.Errorf("while it is being stopped: %v", err)
	}
	m.killAll()
	if _, err := s.Snapshot(t.Context(), "c", "shop"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("dead: %v", err)
	}
	if all := templatesOf(t, st); len(all) != 0 {
		t.Errorf("templates %+v", all)
	}
	s, _, _ = rebootable(t, checkpoint.PolicyReboot)
	s.lookup("c").settings.Template = "shop"
	mustPrepare(t, s)
	if _, err := s.Snapshot(t.Context(), "c", "shop"); !errdefs.IsUnavailable(err) {
		t.Errorf("prepared for a reboot: %v", err)
	}
}

// TestSnapshotInterrupted: what comes during the dump waits for its end, or ends
// it, and nothing half is left.
func TestSnapshotInterrupted(t *testing.T) {
	for name, tc := range map[string]struct {
		during func(t *testing.T, s *service, cancel func())
		made   bool
		want   string
	}{
		"SIGKILL":    {func(t *testing.T, s *service, _ func()) { stop(t, s, 9) }, false, "dead"},
		"the caller": {func(_ *testing.T, _ *service, cancel func()) { cancel() }, false, "running"},
		"SIGTERM": {func(t *testing.T, s *service, _ func()) {
			go s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: 15})
		}, true, "running"},
		"another": {func(t *testing.T, s *service, _ func()) {
			if _, err := s.Snapshot(t.Context(), "c", "shop"); !errdefs.IsUnavailable(err) {
				t.Errorf("a second at a time: %v", err)
			}
			wantStatus(t, s, control.Busy)
		}, true, "running"},
	} {
		t.Run(name, func(t *testing.T) {
			s, m, st := rebootable(t, checkpoint.PolicyTemplate)
			begun, goOn := make(chan struct{}), make(chan struct{})
			var signals atomic.Int32
			m.dump = func(ctx context.Context) error {
				close(begun)
				select {
				case <-goOn:
				case <-m.exited: // CRIU gives up
				}
				m.mu.Lock()
				signals.Store(int32(len(m.signals)))
				m.mu.Unlock()
				return nil
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := s.Snapshot(ctx, "c", "shop")
				done <- err
			}()
			<-begun
			tc.during(t, s, cancel)
			time.Sleep(20 * time.Millisecond)
			close(goOn)
			if err := <-done; (err == nil) != tc.made {
				t.Errorf("error %v", err)
			}
			if err := s.lookup("c").waitWhile(t.Context(), opSnapshot); err != nil {
				t.Fatal(err)
			}
			if n := signals.Load(); n != 0 && name == "SIGTERM" {
				t.Errorf("%d signals during the dump", n)
			}
			wantMachine(t, m, st, tc.want)
			if all := templatesOf(t, st); (len(all) == 1) != tc.made {
				t.Errorf("templates %+v", all)
			}
		})
	}
}

// clone is a container that is to begin from the template shop.
func clone(version checkpoint.ID) *container {
	c := newContainer("clone")
	c.optedIn = true
	c.identity = checkpoint.Identity{Namespace: "ns", Key: "other", Container: "app"}
	c.settings = checkpoint.Settings{Policy: checkpoint.PolicyTemplate, Template: "shop"}
	c.annotations = map[string]string{checkpoint.InternalTemplateVersion: string(version)}
	return c
}

// TestClaimTemplate: a version that was replaced meanwhile gives way to the
// newer one, and one from which a container died soon is not tried again.
func TestClaimTemplate(t *testing.T) {
	s, _, st := rebootable(t, checkpoint.PolicyTemplate)
	snapshot := func() checkpoint.ID {
		r, err := s.Snapshot(t.Context(), "c", "shop")
		if err != nil {
			t.Fatal(err)
		}
		return r.CheckpointID
	}
	v1 := snapshot()
	v2 := snapshot()
	pin, err := s.claim(t.Context(), st, clone(v1), v1)
	if err != nil || pin.ID() != v2 {
		t.Fatalf("got %v, %v, want version %s", pin, err, v2)
	}
	if err := pin.Consume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if all := templatesOf(t, st); len(all) != 1 || len(all[0].Pins) != 0 {
		t.Errorf("a template was used up, or stays pinned: %+v", all)
	}

	c := clone(v2)
	c.restoredFrom, c.startedAt = pin.Manifest(), time.Now()
	s.noteClone(c, time.Now())
	_, err = s.claim(t.Context(), st, clone(v2), v2)
	var refusal *restore.Refusal
	if !errors.As(err, &refusal) || refusal.Code != restore.CrashLooping {
		t.Errorf("after a short life: %v", err)
	}
	c.startedAt = time.Now().Add(-time.Hour)
	s.noteClone(c, time.Now())
	if pin, err = s.claim(t.Context(), st, clone(v2), v2); err != nil {
		t.Fatalf("after a long life: %v", err)
	}
	if err := pin.Release(t.Context()); err != nil {
		t.Error(err)
	}

	if err := os.WriteFile(filepath.Join(pin.Dir(), checkpoint.ManifestFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = s.claim(t.Context(), st, clone(v2), v2); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("damaged: %v", err)
	}
	if stateOf(t, st) != store.Quarantined {
		t.Error("the damaged version was not quarantined")
	}
	if _, err = s.claim(t.Context(), st, clone(v2), v2); !errors.Is(err, checkpoint.ErrNotFound) {
		t.Errorf("without any version: %v", err)
	}
}

// TestTemplateSetAside: only damage takes a template away from the others.
func TestTemplateSetAside(t *testing.T) {
	for code, gone := range map[string]bool{"criu": false, "hook": false, "incompatible": false, "crash-loop": false, "mismatch": false, "corrupt": true} {
		t.Run(code, func(t *testing.T) {
			s, _, st := rebootable(t, checkpoint.PolicyTemplate)
			r, err := s.Snapshot(t.Context(), "c", "shop")
			if err != nil {
				t.Fatal(err)
			}
			c := clone(r.CheckpointID)
			p := &pendingRestore{}
			if p.claim, err = s.claim(t.Context(), st, c, r.CheckpointID); err != nil {
				t.Fatal(err)
			}
			s.setAside(t.Context(), c, p, code, errors.New("why"))
			all := templatesOf(t, st)
			if (len(all) == 0) != gone || len(all) > 0 && len(all[0].Pins) > 0 {
				t.Errorf("templates %+v", all)
			}
		})
	}
}

// TestPromote: the first container that began cold becomes the template that its
// pod names; there is none afterwards that would be another.
func TestPromote(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyTemplate)
	c := s.lookup("c")
	c.annotations = map[string]string{checkpoint.InternalImageDigest: "sha256:1"}
	boot, err := checkpoint.BootID()
	if err != nil {
		t.Fatal(err)
	}
	facts := fmt.Sprintf(`{"bootID": %q, "arch": "amd64", "criuVersion": "4.2.1", "cpuFlags": ["sse2"]}`, boot)
	if err := os.WriteFile(filepath.Join(s.config.RuntimeDir, hostFactsFile), []byte(facts), 0o600); err != nil {
		t.Fatal(err)
	}
	skipped := func(why string) {
		t.Helper()
		if p, err := s.Promote(t.Context(), "c"); err != nil || !strings.Contains(p.Skipped, why) {
			t.Errorf("%+v, %v, want %q", p, err, why)
		}
		if all := templatesOf(t, st); len(all) > 1 {
			t.Errorf("templates %+v", all)
		}
	}
	if p, err := s.Promote(t.Context(), "unknown"); err != nil || p.Skipped == "" {
		t.Errorf("unknown: %+v, %v", p, err)
	}
	skipped("names no template")
	c.settings.Template = "shop"
	c.restoredFrom = &checkpoint.Manifest{ID: "x"}
	skipped("went on from checkpoint x")
	c.restoredFrom = nil
	m.dump = func(context.Context) error { return errors.New("no") }
	if _, err := s.Promote(t.Context(), "c"); err == nil || !strings.Contains(err.Error(), "CRIU failed") {
		t.Errorf("failed dump: %v", err)
	}
	wantMachine(t, m, st, "running")
	m.dump = func(context.Context) error { return nil }
	promote := func(already bool) checkpoint.ID {
		t.Helper()
		p, err := s.Promote(t.Context(), "c")
		if err != nil || p.Skipped != "" || p.Already != already || p.CheckpointID == "" {
			t.Fatalf("%+v, %v", p, err)
		}
		return p.CheckpointID
	}
	first := promote(false)
	wantMachine(t, m, st, "running")
	if again := promote(true); again != first {
		t.Errorf("version %s, want %s", again, first)
	}
	// One of an older stasis is none for a container whose memory is to be mapped.
	old, err := st.LatestTemplate(t.Context(), c.identity.Namespace, "shop")
	if err != nil {
		t.Fatal(err)
	}
	old.Files = slices.DeleteFunc(old.Files, checkpoint.File.OfMapped)
	dir := filepath.Join(st.Root(), "templates", c.identity.Namespace, "shop", string(first))
	data, err := old.Encode()
	if err := errors.Join(err, os.WriteFile(filepath.Join(dir, checkpoint.ManifestFile), data, 0o600), os.RemoveAll(filepath.Join(dir, checkpoint.MappedDir))); err != nil {
		t.Fatal(err)
	}
	promote(true)
	c.settings.Memory = checkpoint.MemoryMapped
	if again := promote(false); again == first {
		t.Error("it is not made anew")
	}
	promote(true)
	// Another image, or another spec, makes another version.
	c.annotations[checkpoint.InternalImageDigest] = "sha256:other"
	second := promote(false)
	promote(true)
	c.fingerprint = checkpoint.Fingerprint{"args": "other"}
	promote(false)
	if all := templatesOf(t, st); len(all) != 1 || all[0].Version == first || all[0].Version == second {
		t.Errorf("templates %+v", all)
	}
	m.killAll()
	skipped("it has exited")
}
