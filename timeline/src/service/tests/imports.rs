//! Imports that fail, and that are watched.

use ebb_types::Hint as _;

use super::*;

#[tokio::test]
async fn an_import_that_fails_says_why_and_leaves_nothing() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    rig.node.0.lock().fail_import = true;
    for (project, branch) in [("shop", Some("imported")), ("other", None)] {
        let error = import(&service, project, branch).await.unwrap_err();
        assert_eq!((error.chain().as_str(), error.hint().as_deref()), ("damaged", Some("Mend it.")));
        assert!(rig.node.0.lock().staged.is_empty());
        assert_settled(&rig, &service).await;
    }
    assert_eq!(service.branch("shop", "imported").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(service.project_info("other").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(import(&service, "shop", None).await.unwrap_err().kind(), ErrorKind::Invalid, "no branch was named");
    rig.node.0.lock().fail_import = false;
    import(&service, "shop", Some("imported")).await.unwrap();
    assert_eq!(import(&service, "shop", Some("imported")).await.unwrap_err().kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn an_import_into_a_project_is_carried_out_from_its_first_entry_on() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    let request = api::CreateProject { name: "shop".parse().unwrap(), current: None, pg_major: None };
    service.create_project(&caller(), request).await.unwrap();
    rig.node.0.lock().import_pauses = Some(Arc::default());
    let request = api::StartImport {
        project: "shop".parse().unwrap(),
        branch: Some("copy".parse().unwrap()),
        from: api::ImportOrigin::Directory { path: "/elsewhere".into() },
        follow: false,
        database: None,
    };
    let begun = service.import(&caller(), request).await.unwrap().value;
    // Nobody takes it for interrupted: not before its task runs for the first time, and not while it does.
    service.recover().await;
    wait_until(|| !rig.node.0.lock().staged.is_empty()).await;
    service.recover().await;
    rig.node.0.lock().import_pauses.take().unwrap().notify_one();
    wait_until(|| service.show_import(begun.id).unwrap().state != api::ImportState::Running).await;
    assert_eq!(service.show_import(begun.id).unwrap().state, api::ImportState::Done);
    service.branch("shop", "copy").await.unwrap();
}

#[tokio::test]
async fn while_an_import_is_under_way_it_can_be_watched_and_cancelled_and_its_project_stays() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    rig.node.0.lock().import_pauses = Some(Arc::default());
    let request = api::StartImport {
        project: "shop".parse().unwrap(),
        branch: None,
        from: api::ImportOrigin::Directory { path: "/elsewhere".into() },
        follow: false,
        database: None,
    };
    let begun = service.import(&caller(), request.clone()).await.unwrap().value;
    wait_until(|| !rig.node.0.lock().staged.is_empty()).await;
    // Nobody takes it for interrupted, or for a project that came to nothing.
    service.recover().await;
    assert_eq!(service.list_imports(), [service.show_import(begun.id).unwrap()]);
    assert_eq!(service.project_info("shop").await.unwrap().branches.len(), 0);
    assert_eq!(service.import(&caller(), request).await.unwrap_err().kind(), ErrorKind::Invalid);
    let busy = service.delete_project(&caller(), "shop", Some("shop")).await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Conflict, "{}", busy.chain());
    assert_eq!(service.cut_over(begun.id).unwrap_err().kind(), ErrorKind::Invalid, "it follows nothing");
    service.cancel_import(begun.id).unwrap();
    wait_until(|| service.show_import(begun.id).unwrap().state == api::ImportState::Failed).await;
    assert_eq!(service.show_import(begun.id).unwrap().fault.as_deref(), Some("the import was cancelled"));
    assert_eq!(service.cancel_import(begun.id).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(service.project_info("shop").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_settled(&rig, &service).await;
}
