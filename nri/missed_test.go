package nri

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

func TestFindMissed(t *testing.T) {
	pod := func(id string, annotations map[string]string) *api.PodSandbox {
		return &api.PodSandbox{Id: id, Name: "pod-" + id, Uid: "uid-" + id, Namespace: "default", Annotations: annotations}
	}
	pods := []*api.PodSandbox{
		pod("reboot", map[string]string{checkpoint.AnnotationPolicy: "reboot"}),
		pod("keyed", map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: "key-1"}),
		pod("clone", map[string]string{checkpoint.AnnotationTemplate: "shop"}),
		pod("one", map[string]string{checkpoint.ContainerAnnotation(checkpoint.AnnotationPolicy, "c"): "resume"}),
		pod("plain", nil),
		pod("bad", map[string]string{checkpoint.AnnotationPolicy: "always"}),
	}
	ctr := func(id, sandbox, name string, annotations map[string]string) *api.Container {
		return &api.Container{Id: id, PodSandboxId: sandbox, Name: name, Annotations: annotations, CreatedAt: 12}
	}
	found := findMissed(pods, []*api.Container{
		ctr("a", "reboot", "c", nil),
		ctr("b", "reboot", "d", map[string]string{checkpoint.InternalPolicy: "reboot"}), // decided
		ctr("c", "keyed", "c", nil),
		ctr("d", "clone", "c", nil),
		ctr("e", "one", "c", nil),
		ctr("f", "one", "other", nil),
		ctr("g", "plain", "c", nil),
		ctr("h", "bad", "c", nil),
		ctr("i", "of no pod", "c", nil),
	})
	want := map[string]checkpoint.Identity{
		"a": {Namespace: "default", Key: "uid-reboot", Container: "c"},
		"c": {Namespace: "default", Key: "key-1", Container: "c"},
		"d": {Namespace: "default", Key: "uid-clone", Container: "c"},
		"e": {Namespace: "default", Key: "uid-one", Container: "c"},
	}
	got := map[string]checkpoint.Identity{}
	for id, m := range found {
		got[id] = m.Identity
		if m.ContainerID != id || m.PodName != "pod-"+m.sandboxID || m.PodUID != "uid-"+m.sandboxID || m.created.UnixNano() != 12 {
			t.Errorf("%s: %+v", id, m)
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("found %v, want %v", got, want)
	}
	if found["d"].keepsRecords || !found["e"].keepsRecords {
		t.Error("a clone keeps no records, a container with policy resume does")
	}
}

// TestSupersede: of the checkpoints of a missed container those that are older
// than it are set aside, a newer one stays, and so do those of others.
func TestSupersede(t *testing.T) {
	ctx := context.Background()
	created := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name         string
		keepsRecords bool
		records      []time.Duration // before its creation
		damaged      bool            // the newest
		aside, left  int
		types        []event.Type
	}{
		{"none", true, nil, false, 0, 0, []event.Type{event.Ignored}},
		{"one", true, []time.Duration{time.Hour}, false, 1, 0, []event.Type{event.ColdStart, event.Quarantined}},
		{"two", true, []time.Duration{2 * time.Hour, time.Hour}, false, 2, 0, []event.Type{event.ColdStart, event.Quarantined, event.ColdStart, event.Quarantined}},
		{"damaged", true, []time.Duration{time.Hour}, true, 1, 0, []event.Type{event.ColdStart, event.Quarantined}},
		{"newer", true, []time.Duration{-time.Minute}, false, 0, 1, []event.Type{event.Ignored}},
		{"clone", false, []time.Duration{time.Hour}, false, 0, 1, []event.Type{event.Ignored}},
	} {
		t.Run(c.name, func(t *testing.T) {
			st := fullStore(t, 1) // somebody else's
			identity := identityNumber(7)
			var ids []checkpoint.ID
			for _, before := range c.records {
				ids = append(ids, writeRecord(t, st.Root(), identity, created.Add(-before)))
			}
			if c.damaged {
				if err := os.WriteFile(filepath.Join(st.Root(), "checkpoints", identity.Hash(), string(ids[len(ids)-1]), checkpoint.ManifestFile), []byte("{"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s := newServer(Config{Root: st.Root()}, st)
			m := missed{sandboxID: "sandbox", keepsRecords: c.keepsRecords, created: created}
			m.Identity, m.ContainerID, m.PodName, m.PodUID = identity, "id", "pod", "uid"
			s.plugin.pods.add(testPod(nil))
			s.supersede(ctx, m)
			if c.aside == 0 {
				s.supersede(ctx, m) // says it no second time
			}
			records, err := st.List(ctx)
			if err != nil {
				t.Fatal(err)
			}
			states := map[store.State]int{}
			for _, r := range records {
				states[r.State]++
			}
			if states[store.Quarantined] != c.aside || states[store.Committed] != c.left+1 || states[store.Corrupt] != 0 {
				t.Errorf("states %v, want %d set aside and %d left", states, c.aside, c.left+1)
			}
			var types []event.Type
			for _, e := range readEvents(t, st.Root()) {
				types = append(types, e.Type)
				if e.ReasonCode != "missed" || e.ContainerID != "id" || *e.Identity != identity || e.Reason == "" {
					t.Errorf("event %+v", e)
				}
			}
			if !slices.Equal(types, c.types) {
				t.Errorf("events %v, want %v", types, c.types)
			}
		})
	}
}
