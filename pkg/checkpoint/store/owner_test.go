package store

import (
	"encoding/json"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestOwnerAlive(t *testing.T) {
	self, err := thisProcess()
	must(t, err)
	zombie := exec.Command("true")
	must(t, zombie.Start())
	defer zombie.Wait()
	for {
		if st, err := readStat(zombie.Process.Pid); err != nil {
			t.Fatal(err)
		} else if st.zombie {
			break
		}
		time.Sleep(time.Millisecond)
	}
	living := exec.Command("sleep", "60")
	must(t, living.Start())
	defer func() { living.Process.Kill(); living.Wait() }()
	of := func(pid int) Owner {
		o := self
		st, err := readStat(pid)
		must(t, err)
		o.PID, o.StartTicks = pid, st.startTicks
		return o
	}
	with := func(o Owner, f func(o *Owner)) Owner { f(&o); return o }
	for name, test := range map[string]struct {
		o    Owner
		want bool
	}{
		"this process":          {self, true},
		"another process":       {of(living.Process.Pid), true},
		"a zombie":              {of(zombie.Process.Pid), false},
		"number used again":     {with(self, func(o *Owner) { o.StartTicks-- }), false},
		"no such process":       {with(self, func(o *Owner) { o.PID = 1 << 30 }), false},
		"other boot":            {with(self, func(o *Owner) { o.BootID = "x" }), false},
		"other namespace":       {with(self, func(o *Owner) { o.PID, o.PIDNamespace = 1<<30, "pid:[1]" }), true},
		"other boot, namespace": {with(self, func(o *Owner) { o.BootID, o.PIDNamespace = "x", "pid:[1]" }), false},
	} {
		if got := self.alive(test.o); got != test.want {
			t.Errorf("%s: alive is %v", name, got)
		}
	}
}

// TestOwnerFiles: who may take a claim away from whom.
func TestOwnerFiles(t *testing.T) {
	dead, err := thisProcess()
	must(t, err)
	dead.StartTicks++
	deadJSON, err := json.Marshal(dead)
	must(t, err)
	for name, test := range map[string]struct {
		change func(path string) error
		stale  bool
	}{
		"untouched":            {func(string) error { return nil }, false},
		"dead":                 {func(p string) error { return os.WriteFile(p, deadJSON, 0o600) }, true},
		"missing":              {os.Remove, true},
		"damaged, young":       {func(p string) error { return os.WriteFile(p, []byte("{"), 0o600) }, false},
		"empty, young":         {func(p string) error { return os.WriteFile(p, nil, 0o600) }, false},
		"huge, young":          {func(p string) error { return os.Truncate(p, 1<<40) }, false},
		"damaged, but old now": {func(p string) error { return damagedLongAgo(p) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := openOS(t)
			ctx := t.Context()
			id := mustCommit(t, s, alice, 0)
			_, err := s.Claim(ctx, id, "c")
			must(t, err)
			must(t, test.change(s.claimedPath(id)+ownerSuffix))
			if !test.stale {
				_, err := s.Latest(ctx, alice)
				wantIs(t, err, checkpoint.ErrBusy)
				_, err = s.Claim(ctx, id, "d")
				wantIs(t, err, checkpoint.ErrBusy)
				wantIs(t, s.Remove(ctx, id), checkpoint.ErrBusy)
				if r, err := s.Sweep(ctx); err != nil || len(r.Released) != 0 {
					t.Errorf("sweep: %+v, %v", r, err)
				}
				return
			}
			m, err := s.Latest(ctx, alice)
			must(t, err)
			if m.ID != id {
				t.Errorf("latest is %s", m.ID)
			}
			// Claim takes it over without Latest as well.
			_, err = s.Claim(ctx, id, "d")
			must(t, err)
			must(t, test.change(s.claimedPath(id)+ownerSuffix))
			c, err := s.Claim(ctx, id, "e")
			must(t, err)
			must(t, test.change(s.claimedPath(id)+ownerSuffix))
			if r, err := s.Sweep(ctx); err != nil || len(r.Released) != 1 || r.Released[0] != id {
				t.Errorf("sweep: %+v, %v", r, err)
			}
			wantIs(t, c.Release(ctx), checkpoint.ErrNotFound)
			tidy(t, s)
		})
	}
}

func damagedLongAgo(path string) error {
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		return err
	}
	then := time.Now().Add(-UnreadableOwnerGrace - time.Second)
	return os.Chtimes(path, then, then)
}

// TestSweepStages: only stages of the dead go.
func TestSweepStages(t *testing.T) {
	s := openOS(t)
	ctx := t.Context()
	live, err := s.Stage(ctx, checkpoint.NewID(alice, noon))
	must(t, err)
	dead, err := s.Stage(ctx, checkpoint.NewID(alice, noon))
	must(t, err)
	must(t, os.Remove(dead.Dir()+ownerSuffix))
	must(t, fill(s.fs, dead.Dir(), dead.id))
	r, err := s.Sweep(ctx)
	if err != nil || r.Stages != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := os.Stat(dead.Dir()); err == nil {
		t.Error("dead stage is still there")
	}
	m := manifestFor(alice, 0)
	m.ID = live.id
	must(t, fill(s.fs, live.Dir(), m.ID))
	must(t, live.Commit(ctx, m))
}
